"""llm.py against transformers, against the golden spoken LM, and against itself with caches."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora
from llm import NAMES, SKIP, TINY, Llama, LlamaConfig, frequencies, load_llama, pick, settle_head
from weights import load_strict, rename

GOLDEN = Path(__file__).parent / "golden" / "taste" / "taslm_latent.safetensors"
CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SMALL = replace(TINY, vocab=50, width=32, layers=2, head_dim=8, ffn=48)
HF = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama2": {"max_position_embeddings": 4096},
    "tinyllama": {"num_key_value_heads": 2, "rope_scaling": None, "tie_word_embeddings": False},
    "smollm2": {"num_key_value_heads": 1, "rope_theta": 1e5, "tie_word_embeddings": True},
    "llama3.2": {
        "head_dim": 16,  # heads * head_dim != hidden_size
        "num_key_value_heads": 2,
        "rope_theta": 5e5,
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64},
        "tie_word_embeddings": True,
    },
}


def tiny(config: LlamaConfig = SMALL, seed: int = 0) -> Llama:
    """A model with weights that are not small, so that mistakes show."""
    torch.manual_seed(seed)
    model = Llama(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.3)
    return model


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_is_transformers(variant: str, seed: int, tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    config = HF | VARIANTS[variant]
    torch.manual_seed(seed)
    theirs = hf.LlamaForCausalLM(hf.LlamaConfig(**config)).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.3)
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {k: v.contiguous() for k, v in theirs.state_dict().items()}
    if config.get("tie_word_embeddings"):
        del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    ours = load_llama(tmp_path)
    assert (ours.head is None) == config.get("tie_word_embeddings", False)
    ids, keep = torch.randint(50, (3, 150)), torch.arange(150) < torch.tensor([[150], [7], [80]])
    with torch.no_grad():
        a = ours.logits(ours(ids, keep=keep))[keep]
        b = theirs(ids, attention_mask=keep.long()).logits[keep]
    assert (a - b).abs().max() <= 2e-5 * b.abs().max()


def test_reads_the_config_that_transformers_5_writes() -> None:
    hf = pytest.importorskip("transformers")
    old = HF | VARIANTS["llama3.2"]
    new = hf.LlamaConfig(**old).to_dict()
    assert replace(LlamaConfig.from_hf(old), tied=True) == LlamaConfig.from_hf(new)


def test_frequencies_are_those_of_the_library() -> None:
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 2048, "num_attention_heads": 32, "head_dim": 64, "rope_theta": 5e5}
    config = hf.LlamaConfig(**sizes, rope_scaling=LLAMA3)
    theirs, _ = rope.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    torch.testing.assert_close(frequencies(LlamaConfig(), CPU), theirs, rtol=1e-6, atol=0)
    quirk = frequencies(LlamaConfig(rope_bf16=True), CPU)
    assert torch.equal(quirk, theirs.bfloat16().float())


def spoken_lm() -> tuple[Llama, Llama, dict[str, Tensor]]:
    """The language model of the golden file with LoRA, without, and the file."""
    g, prefix = load_file(GOLDEN), "weights.spoken_lm.language_model."
    public = {k.removeprefix(prefix): v for k, v in g.items() if k.startswith(prefix)}
    tensors = rename(rename(public, lora.NAMES), NAMES, SKIP)
    config = replace(SMALL, vocab=96, ffn=64, rope_theta=5e5, rope_factor=32.0)
    plain, adapted = Llama(config), Llama(replace(config, rope_bf16=True))
    lora.add_lora(adapted, ("q", "k", "v", "o", "gate", "up", "down"), rank=4, alpha=8)
    load_strict(adapted, tensors)
    base = {k.replace(".base.", "."): v for k, v in tensors.items() if k[-2:] not in (".A", ".B")}
    load_strict(plain, base)
    return adapted.eval(), plain.eval(), g


def test_quirk_rounded_rope_and_lora_are_those_of_the_golden_spoken_lm() -> None:
    adapted, plain, g = spoken_lm()
    keep = g["attention_mask"].bool()
    for merged in (False, True):
        if merged:
            lora.merge(adapted)
        hidden = adapted(embeddings=g["inputs_embeds"], keep=keep)
        for ours, theirs in ((hidden, "last_hidden"), (adapted.logits(hidden), "text_logits")):
            error = (ours - g[theirs])[keep].abs().max()
            assert error <= 2e-5 * g[theirs][keep].abs().max()
    start = torch.full((len(keep), 1), 90)  # sos_id
    logits = plain.logits(plain(torch.cat([start, g["llm_token_ids"]], 1)))
    error = (logits - g["ref_text_logits"]).abs().max()
    assert error <= 2e-5 * g["ref_text_logits"].abs().max()


def test_a_head_in_the_file_is_used_and_a_copy_is_tied() -> None:
    state = {
        "model.embed_tokens.weight": torch.randn(50, 32),
        "lm_head.weight": torch.randn(50, 32),
    }
    own, tensors = settle_head(SMALL, rename(state, NAMES))
    assert not own.tied
    assert torch.equal(tensors["head.weight"], state["lm_head.weight"])
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    same, tensors = settle_head(SMALL, rename(state, NAMES))
    assert same.tied
    assert tensors.keys() == {"embed.weight"}
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    assert rename(old, NAMES, SKIP) == {}


@pytest.mark.parametrize("chunks", [(1,) * 12, (5, 1, 1, 5), (12,)])
def test_cached_is_uncached(chunks: tuple[int, ...]) -> None:
    model, ids = tiny(), torch.randint(50, (3, 12))
    caches = model.new_caches(12)
    parts = [model(part, caches=caches) for part in ids.split(chunks, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("left", [False, True])
def test_a_padded_batch_gives_what_single_sequences_give(left: bool) -> None:
    model, ids = tiny(), torch.randint(50, (3, 9))
    lengths = torch.tensor([[9], [1], [5]])
    keep = torch.arange(9) >= 9 - lengths if left else torch.arange(9) < lengths
    embeddings = model.embed(ids)
    hidden = model(embeddings=embeddings.masked_fill(~keep[..., None], 1e4), keep=keep)
    assert hidden.isfinite().all()
    mask = model.mask(embeddings, 0, 9, keep)
    assert mask is not None
    assert mask.any(-1).all()  # nobody is left with nothing to attend to
    for row, real in enumerate(keep):
        alone = model(ids[row][real][None])[0]
        torch.testing.assert_close(hidden[row, real], alone, rtol=1e-4, atol=1e-5)


def test_prompts_of_different_length_continue_in_one_batch() -> None:
    model, prompt, more = tiny(), torch.randint(50, (2, 6)), torch.randint(50, (2, 4))
    keep, caches = torch.arange(6) < torch.tensor([[6], [2]]), model.new_caches(10)
    model(prompt, keep=keep, caches=caches)
    parts = []
    for t in range(4):
        keep = torch.cat([keep, torch.ones(2, 1, dtype=torch.bool)], 1)
        parts.append(model(more[:, t : t + 1], keep=keep, caches=caches))
    for row, n in ((0, 6), (1, 2)):
        alone = model(torch.cat([prompt[row, :n], more[row]])[None])[0, n:]
        torch.testing.assert_close(torch.cat(parts, 1)[row], alone, rtol=1e-4, atol=1e-5)


def test_the_future_does_not_change_the_past() -> None:
    model, ids = tiny(), torch.randint(50, (2, 10))
    later = ids.clone()
    later[:, 6:] = (later[:, 6:] + 1) % 50
    a, b = model(ids), model(later)
    assert torch.equal(a[:, :6], b[:, :6])
    assert not torch.isclose(a[:, 6:], b[:, 6:]).all(-1).any()


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_reaches_every_parameter(tied: bool) -> None:
    model = tiny(replace(SMALL, tied=tied)).train()
    model.logits(model(torch.arange(50)[None])).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_norms_stay_in_fp32_under_autocast_and_bf16_weights_run() -> None:
    model, ids = tiny(), torch.randint(50, (2, 10))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(ids).dtype == torch.float32
    x = torch.randn(64, 32).bfloat16()
    exact = torch.nn.functional.rms_norm(x.double(), (32,), eps=1e-5).bfloat16()
    torch.nn.init.ones_(model.norm.weight)
    assert (model.bfloat16().norm(x) != exact).float().mean() < 0.02
    assert model(ids).dtype == torch.bfloat16


def test_starts_small() -> None:
    torch.manual_seed(0)
    model = Llama(TINY)
    assert model.embed.weight.std().item() == pytest.approx(0.02, rel=0.05)
    ids, other = torch.arange(300), (torch.arange(300) + 7) % 300
    loss = torch.nn.functional.cross_entropy(model.logits(model(ids[None]))[0], other)
    assert loss.item() == pytest.approx(5.77, abs=0.3)  # log 320


def test_pick_draws_what_it_should() -> None:
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()[
        torch.tensor([3, 0, 2, 1])
    ]  # ids by rank 1230
    rng = torch.Generator().manual_seed(0)

    def shares(temperature: float, top_p: float) -> list[float]:
        drawn = pick(logits.expand(100, 200, 4), temperature, top_p, rng)
        assert drawn.shape == (100, 200)
        return (drawn.flatten().bincount(minlength=4) / 20000).tolist()

    assert shares(0, 1) == [0, 1, 0, 0]
    assert shares(1, 1) == pytest.approx([0.1, 0.5, 0.2, 0.2], abs=0.02)
    assert shares(1, 0.5) == [0, 1, 0, 0]  # 0.5 reaches 0.5
    assert shares(1, 0.85) == pytest.approx([0, 5 / 9, 2 / 9, 2 / 9], abs=0.02)
    assert shares(0.5, 1) == pytest.approx([1 / 34, 25 / 34, 4 / 34, 4 / 34], abs=0.02)
    assert shares(1, 1e-6) == shares(1e-30, 1) == [0, 1, 0, 0]
    two = shares(1, 0.6)  # the id that crosses top_p stays
    assert sorted(two)[:2] == [0, 0]
    assert two[1] == pytest.approx(5 / 7, abs=0.02)


def test_pick_follows_its_generator() -> None:
    logits = torch.randn(3, 7)
    a, b = (pick(logits, 1.0, 0.9, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)
    assert pick(torch.tensor([1e10, 2e10]), 1e-30) == 1  # cold, but no overflow


def test_says_what_is_wrong() -> None:
    for change, message in {
        "heads must be|kv_heads=3": {"kv_heads": 3},
        "head_dim must be even": {"head_dim": 7},
        "layers must be at least 1, got 0": {"layers": 0},
    }.items():
        with pytest.raises(ValueError, match=change):
            LlamaConfig(**message)  # type: ignore[arg-type]
    for bad, text in (
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope type 'yarn' is unknown"),
        ({"model_type": "mistral"}, "model_type='mistral', only 'llama'"),
        ({"attention_bias": True}, "attention_bias=True, only False"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "'factor' is missing"),
    ):
        with pytest.raises(ValueError, match=text):
            LlamaConfig.from_hf(HF | bad)
    model, ids = tiny(replace(SMALL, max_tokens=8)), torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="either ids or embeddings"):
        model()
    with pytest.raises(ValueError, match="9 tokens, the model takes 8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    caches = model.new_caches(8)
    model(ids, caches=caches)
    with pytest.raises(ValueError, match=r"past \+ N\) = \(2, 6\), got torch.bool \(2, 1\)"):
        model(ids[:, :1], keep=torch.ones(2, 1, dtype=torch.bool), caches=caches)
    with pytest.raises(ValueError, match="temperature >= 0 and 0 < top_p <= 1"):
        pick(torch.zeros(4), top_p=0.0)
