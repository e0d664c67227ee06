"""weights.py: strict or not at all, every damaged file, atomic checkpoints."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import weights
from speaker import TINY as SPEAKER


@dataclass(frozen=True)
class Sizes:
    width: int = 3
    kernels: tuple[int, ...] = (1, 3)
    pairs: tuple[tuple[int, int], ...] = ((1, 2), (3, 4))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


# --- names ---------------------------------------------------------------------------------------

NAMES = {r"enc\.(\d+)\.w": r"layers.\1.weight", r"head": "head.weight"}


def test_rename_maps_and_skips() -> None:
    x = {"enc.0.w": torch.zeros(1), "enc.12.w": torch.ones(2), "head": torch.ones(3), "step": x0()}
    got = weights.rename(x, NAMES, skip=[r"step"])
    assert {k: len(v) for k, v in got.items()} == {
        "layers.0.weight": 1,
        "layers.12.weight": 2,
        "head.weight": 3,
    }


def x0() -> Tensor:
    return torch.zeros(1)


def test_rename_reports_all_unknown_names_at_once() -> None:
    with pytest.raises(ValueError, match="3 unknown tensors") as e:
        weights.rename({k: x0() for k in ("enc.0.w", "enc.x.w", "heads", "b")}, NAMES)
    assert [line.split(":")[0] for line in str(e.value).split("\n  ")[1:]] == [
        "b",
        "enc.x.w",
        "heads",
    ]


def test_rename_refuses_two_tensors_for_one_place_and_two_rows_for_one_tensor() -> None:
    with pytest.raises(ValueError, match=r"b: maps to \['c'\]"):
        weights.rename({"a": x0(), "b": x0()}, {"a|b": "c"})
    with pytest.raises(ValueError, match=r"a: maps to \['b', 'c'\]"):
        weights.rename({"a": x0()}, {"a": "b", "[a]": "c"})


def test_load_strict_reports_all_differences_and_leaves_the_model_untouched() -> None:
    model, before, other = net(0), net(0), net(1).state_dict()
    del other["0.bias"], other["1.running_var"]
    other |= {"2.weight": torch.zeros(2, 5), "extra.a": x0(), "extra.b": x0()}
    with pytest.raises(ValueError, match="folder x: 5 problems") as e:
        weights.load_strict(model, other, "folder x")
    assert str(e.value).split("\n  ")[1:] == [
        "0.bias: in the model, not in the file",
        "1.running_var: in the model, not in the file",
        "2.weight: [2, 5] in the file, [2, 4] here",
        "extra.a: in the file, not in the model",
        "extra.b: in the file, not in the model",
    ]
    assert same(model, before)


def test_load_strict_fills_everything_and_keeps_the_dtype() -> None:
    model = net(0)
    half = {k: v.half() if v.is_floating_point() else v for k, v in net(1).state_dict().items()}
    weights.load_strict(model, half)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(v, half[k].to(v.dtype)) for k, v in model.state_dict().items())


# --- files ---------------------------------------------------------------------------------------

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b.c": torch.arange(4)}


def check(got: dict[str, Tensor]) -> None:
    assert got.keys() == TENSORS.keys()
    assert all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in TENSORS.items())


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: {"epoch": 3, "step": 1.5, **x},
        lambda x: {"dims": {"n_mels": 80}, "model_state_dict": x},
    ],
    ids=["plain", "with numbers", "openai"],
)
def test_pickles(tmp_path: Path, suffix: str, zipped: bool, wrap: Callable[[Any], Any]) -> None:
    path = tmp_path / f"w{suffix}"
    torch.save(wrap(TENSORS), path, _use_new_zipfile_serialization=zipped)
    check(weights.read_tensors(path))


def test_safetensors_file_folder_and_shards(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    check(weights.read_tensors(tmp_path / "model.safetensors"))
    check(weights.read_tensors(tmp_path))
    shards = tmp_path / "shards"
    shards.mkdir()
    files = {"a": "model-00001-of-00002.safetensors", "b.c": "model-00002-of-00002.safetensors"}
    for name, file in files.items():
        save_file({name: TENSORS[name]}, shards / file)
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    check(weights.read_tensors(shards))
    (shards / files["b.c"]).unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors: no such"):
        weights.read_tensors(shards)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": null}'])
def test_a_damaged_index_of_shards(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json: (damaged or from another|holds a)"):
        weights.read_tensors(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "a.pt", tmp_path / "a.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such weight file; see README"):
            weights.read_tensors(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "content",
    [b"", b"hello, this is a text", b"\x00" * 64, b"<html>404</html>" * 99, b"\x80\x02}q\x00."],
    ids=["empty", "text", "zeros", "html", "empty dict"],
)
def test_foreign_files_are_one_value_error(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"w\{suffix}: (damaged or not|holds no)") as e:
        weights.read_tensors(path)
    assert "\n" not in str(e.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["safetensors", "zip.pt", "old.pt"])
def test_cut_and_overwritten_files(tmp_path: Path, kind: str) -> None:
    """Whatever the damage: a ValueError, or (a hit on the numbers themselves) tensors."""
    path, rng = tmp_path / f"w.{kind}", Random(0)
    if kind == "safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=kind == "zip.pt")
    good = path.read_bytes()
    for cut in (1, 7, 8, 30, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(ValueError, match="damaged or not a weight file"):
            weights.read_tensors(path)
    for _ in range(150):
        bad = bytearray(good)
        for _ in range(4):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        path.write_bytes(bad)
        with suppress(ValueError):  # any other error fails the test
            weights.read_tensors(path)


@pytest.mark.parametrize("state", [[torch.ones(2)], torch.ones(2), {"lr": 1.0}, {}, 7])
def test_pickles_of_other_things(tmp_path: Path, state: Any) -> None:
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: (damaged or not|holds no tensors)"):
        weights.read_tensors(tmp_path / "w.pt")


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": net()}, tmp_path / "w.pt")  # whole modules need classes, that is, code
    with pytest.raises(ValueError, match="damaged or not a weight file"):
        weights.read_tensors(tmp_path / "w.pt")


# --- model folders -------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [Sizes(), Sizes(9, (5,), ((7, 8),)), SPEAKER])
def test_as_config_after_json_is_the_same_config(config: Any) -> None:
    got = weights.as_config(type(config), json.loads(json.dumps(asdict(config))))
    assert got == config
    assert hash(got) == hash(config)  # nested lists became tuples, too


@pytest.mark.parametrize(
    ("values", "odd"), [({"width": 3}, "kernels"), (asdict(Sizes()) | {"bias": 1}, "bias")]
)
def test_as_config_names_odd_and_missing_keys(values: dict[str, Any], odd: str) -> None:
    with pytest.raises(ValueError, match=rf"asr: keys \[.*'{odd}'.*\] do not fit Sizes"):
        weights.as_config(Sizes, values, "asr")


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_save_and_load_model(tmp_path: Path, dtype: torch.dtype | None) -> None:
    model, folder = net(1), tmp_path / "new" / "model"
    weights.save_model(folder, model, Sizes(), dtype, rate=16000)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert weights.read_config(folder) == json.loads(json.dumps(asdict(Sizes()))) | {"rate": 16000}
    stored = weights.read_tensors(folder)
    assert stored["0.weight"].dtype == (dtype or torch.float32)
    assert stored["1.num_batches_tracked"].dtype == torch.int64
    got = weights.load_model(net(2).train(), folder)
    assert not got.training
    for k, v in model.state_dict().items():
        rounded = v.to(dtype) if dtype and v.is_floating_point() else v
        assert torch.equal(got.state_dict()[k], rounded.to(v.dtype))


def test_save_model_takes_a_dict_of_configs(tmp_path: Path) -> None:
    weights.save_model(tmp_path, net(), {"encoder": asdict(Sizes()), "eos": 2})
    sizes = weights.as_config(Sizes, weights.read_config(tmp_path, "encoder"))
    assert sizes == Sizes()
    with pytest.raises(ValueError, match=r"config\.json: damaged .*KeyError\('decoder'\)"):
        weights.read_config(tmp_path, "decoder")


def test_config_json_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json: not found; a model is a folder"):
        weights.read_config(tmp_path)
    for content in (b"{", b"[1]", b"7", b"\xff\xfe", b""):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"config\.json: (damaged or|holds a)"):
            weights.read_config(tmp_path)


def test_load_model_of_another_size_names_the_folder(tmp_path: Path) -> None:
    weights.save_model(tmp_path, nn.Linear(3, 4), Sizes())
    with pytest.raises(
        ValueError, match=rf"{tmp_path}: 1 problems\n  weight: \[4, 3\] in the file"
    ):
        weights.load_model(nn.Linear(5, 4), tmp_path)


def test_write_atomic_keeps_the_old_file_on_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    weights.write_atomic(path, b"old")
    monkeypatch.setattr("weights.os.replace", crash)
    with pytest.raises(PowerCutError):
        weights.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"


class PowerCutError(BaseException):
    """Nothing can catch it."""


def crash(*args: Any, **kwargs: Any) -> None:
    raise PowerCutError


# --- checkpoints ---------------------------------------------------------------------------------


def training(seed: int) -> dict[str, Any]:
    """A model and an optimizer after one step, so that the optimizer has a state."""
    model = net(seed)
    opt = torch.optim.AdamW(model.parameters(), lr=0.1 * (seed + 1))
    model(torch.ones(2, 3) * torch.tensor([[1.0], [2.0]])).sum().backward()
    opt.step()
    return {"model": model, "optimizer": opt}


def test_a_checkpoint_brings_back_model_optimizer_and_meta(tmp_path: Path) -> None:
    saved, loaded = training(0), training(1)
    weights.save_checkpoint(tmp_path, saved, {"step": 7, "config": {"out": Path("x")}})
    meta = weights.load_checkpoint(tmp_path, loaded)
    assert meta == {"step": 7, "config": {"out": "x"}}
    assert same(saved["model"], loaded["model"])
    a, b = (state["optimizer"].state_dict() for state in (saved, loaded))
    assert a["param_groups"] == b["param_groups"]
    assert torch.equal(a["state"][0]["exp_avg"], b["state"][0]["exp_avg"])


def test_the_newest_steps_stay(tmp_path: Path) -> None:
    state = {"model": net()}
    for step in (5, 10, 999999, 1000000):
        weights.save_checkpoint(tmp_path, state, {"step": step}, keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step_000010",
        "step_1000000",
        "step_999999",
    ]
    assert weights.load_checkpoint(tmp_path, state)["step"] == 1000000


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    for seed in (0, 1):
        weights.save_checkpoint(tmp_path, {"model": net(seed)}, {"step": 5, "seed": seed})
    state = {"model": net(2)}
    assert weights.load_checkpoint(tmp_path, state)["seed"] == 1
    assert same(state["model"], net(1))


@pytest.mark.parametrize("where", ["save_file", "torch.save", "json.dumps", "os.replace"])
def test_a_crash_leaves_the_step_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    weights.save_checkpoint(tmp_path, training(0), {"step": 5})
    with monkeypatch.context() as patch:
        patch.setattr(f"weights.{where}", crash)
        with pytest.raises(PowerCutError):
            weights.save_checkpoint(tmp_path, training(1), {"step": 10})
    state = training(2)
    assert weights.load_checkpoint(tmp_path, state)["step"] == 5
    assert same(state["model"], training(0)["model"])
    weights.save_checkpoint(tmp_path, training(1), {"step": 10})  # over the half-written one
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000005", "step_000010"]


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no step_\* under .*: nothing to resume"):
        weights.load_checkpoint(tmp_path / "run", {"model": net()})


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    weights.save_checkpoint(tmp_path, {"model": nn.Linear(2, 2)}, {"step": 1})
    with pytest.raises(ValueError, match="step_000001: 1 problems\n  bias: in the file"):
        weights.load_checkpoint(tmp_path, {"model": nn.Linear(2, 2, bias=False)})
