"""Imports point down, files stay small, nothing is hidden: the rules that keep the house flat."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = (  # a file imports only from rows above its own
    "common kv_cache cpu_linear audio pitch text vocabulary weights grammar",
    "whisper_enc whisper_dec aggregator fsq rvq s3_units speaker unit_decoder flow hift llm lora"
    " synth",
    "tokenizer vocoder spoken_lm unit_lm metrics",
    "data continuation sizes onnx_file",
    "public bench_peers bench_case",
    "pipeline shards loop",
    "released layer_report token_swap likelihood continuations bench_stages bench_train",
    "scoring listening_page",
    "train_tiny train_tokenizer train_lm train_unit_lm prepare sample evaluate growth bench"
    " public_codecs",
    "compare",
)
ROW = {name: number for number, names in enumerate(ROWS) for name in names.split()}
STAGES = tuple(name for name in ROWS[1].split() if name != "synth")
EXCEPTIONS = {("aggregator", "whisper_dec")}  # TASTE's aggregator is made of decoder layers
LINES = {"hift": 450, "flow": 450, "unit_decoder": 430, "train_tiny": 700}  # all others: 400
FUNCTION_LINES = 60  # train() and train_*() may be longer: a recipe is read from top to bottom
LIBRARIES = {"torch", "torchaudio", "numpy", "soundfile", "safetensors", "sentencepiece"}
LIBRARIES |= {"espeakng_loader", "matplotlib"}
OPTIONAL = {
    "onnx_file": {"onnx", "google"},  # google: protobuf's errors, which onnx raises
    "metrics": {"torchcrepe", "whisper_normalizer"},
    "bench_peers": {"transformers", "peft", "vector_quantize_pytorch", "s3tokenizer"},
    "bench_stages": {"transformers"},
    "public_codecs": {"transformers"},
}

FILES = sorted(ROOT.glob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
PAGES = sorted(ROOT.glob("*.md"))
by_name = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[str]:
    """Top-level names of everything that a file imports, wherever in it the import stands."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import: the repository is no package"
            yield (node.module or "").split(".")[0]


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef):
            yield node


def size(function: ast.FunctionDef) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


@by_name
def test_every_file_has_a_row(path: Path) -> None:
    assert path.stem in ROW


@by_name
def test_imports_point_down(path: Path) -> None:
    up = {
        name
        for name in set(imports(path)) & ROW.keys()
        if ROW[name] >= ROW[path.stem] and (path.stem, name) not in EXCEPTIONS
    }
    assert not up, f"{path.name} (row {ROW[path.stem]}) imports {up}"


@by_name
def test_only_the_libraries_of_the_requirements(path: Path) -> None:
    foreign = set(imports(path)) - ROW.keys() - set(sys.stdlib_module_names)
    allowed = {"torch"} if path.stem in STAGES else LIBRARIES | OPTIONAL.get(path.stem, set())
    assert foreign <= allowed, f"{path.name} imports {foreign - allowed}"


def test_nothing_is_imported_by_name_at_run_time() -> None:
    found = {
        p.name: re.findall(r'import_module\("([\w.]+)"\)|__import__', p.read_text()) for p in FILES
    }
    assert {name for names in found.values() for name in names} <= LIBRARIES


@by_name
def test_budget_of_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LINES.get(path.stem, 400)


@by_name
def test_functions_fit_on_a_screen(path: Path) -> None:
    long = {f.name: size(f) for f in functions(path) if size(f) > FUNCTION_LINES}
    assert not {k: n for k, n in long.items() if not re.match(r"train(_|$)", k)}


def test_most_functions_are_short() -> None:
    sizes = sorted(size(f) for path in FILES for f in functions(path))
    assert sizes[len(sizes) // 2] <= 12


@by_name
def test_every_file_begins_with_its_idea(path: Path) -> None:
    doc = ast.get_docstring(parsed(path))
    assert doc
    assert len(doc.splitlines()) <= 22


@pytest.mark.parametrize("path", [*FILES, *TESTS], ids=lambda path: path.stem)
def test_no_error_is_swallowed(path: Path) -> None:
    """No bare or broad except, and weights enter one to one or not at all."""
    broad = {"Exception", "BaseException"}
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno}: bare except"
            caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
            assert not caught & broad, f"{path.name}:{node.lineno}: broad except"
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "load_state_dict":
            lenient = len(node.args) > 1 or "strict" in {k.arg for k in node.keywords}
            assert not lenient, f"{path.name}:{node.lineno}: load_state_dict(strict=False)"


@pytest.mark.parametrize("path", [*FILES, *TESTS, *PAGES], ids=lambda path: path.name)
def test_no_paths_of_one_machine(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        found = re.search(r"(?<![\w.~-])/(work|tmp|home|root|Users)/", line)
        assert not found, f"{path.name}:{number}: {line.strip()}"
