"""unit_decoder.py: the published code's numbers, and what the published code gets wrong."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unit_decoder import (
    IGNORE,
    NAMES,
    SKIP,
    TINY,
    RelativeAttention,
    UnitDecoder,
    UnitDecoderConfig,
    by_key,
    pick,
    sinusoids,
)
from weights import load_strict, read_tensors, rename

GOLDEN = Path(__file__).parent / "golden" / "taste"
TINIER = UnitDecoderConfig(
    vocab=50, units=20, audio_dim=12, speaker_dim=6, embed_dim=10, branch_width=16, width=24,
    heads=4, ffn=32, text_blocks=2, audio_blocks=1, lm_blocks=2,
)  # fmt: skip
N, U = [5, 2, 7], [4, 9, 0]  # tokens and units of the three items of `batch`


@cache
def golden() -> tuple[UnitDecoder, dict[str, Tensor]]:
    g = read_tensors(GOLDEN / "unit_decoder.safetensors")
    c = json.loads((GOLDEN / "unit_decoder.json").read_text())["config"]
    d, layers = c["decoder"], c["conformer_text_and_audio"]
    model = UnitDecoder(
        UnitDecoderConfig(
            vocab=d["text_token_size"],
            units=d["speech_token_size"],
            audio_dim=d["audio_encoder_input_size"],
            speaker_dim=d["spk_embed_dim"],
            embed_dim=d["encoder_input_size"],
            branch_width=d["llm_input_size"],
            width=d["llm_output_size"],
            heads=layers["attention_heads"],
            ffn=layers["linear_units"],
            text_blocks=layers["num_blocks"],
            audio_blocks=layers["num_blocks"],
            lm_blocks=c["llm"]["num_blocks"],
        )
    )
    public = {k.replace("weights.", "speech_decoder.", 1): v for k, v in g.items()}
    public = {k: v for k, v in public.items() if k.startswith("speech_decoder.")}
    load_strict(model, rename(public, NAMES, SKIP))
    return model.eval(), g


def golden_batch() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = golden()[1]
    ids, units = g["asr_token_ids"], g["speech_token_ids"]
    keep = torch.arange(ids.shape[1]) < g["asr_token_lengths"][:, None]
    real = torch.arange(units.shape[1]) < g["speech_token_lengths"][:, None]
    audio, speaker = g["audio_unit_embeds"], g["speaker_embeds"]
    return ids, keep, audio, speaker, units.masked_fill(~real, IGNORE)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> bool:
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


@cache
def tiny(seed: int = 0, scale: float = 8.0) -> UnitDecoder:
    """Random weights, large enough that attention is not flat and biases are not zero."""
    torch.manual_seed(seed)
    model = UnitDecoder(TINIER).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02 * scale)
    return model


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Three items with N tokens and U units; the last one has no unit at all, that is, only EOS."""
    g = torch.Generator().manual_seed(seed)
    c = TINIER
    keep = torch.arange(max(N)) < torch.tensor(N)[:, None]
    units = torch.randint(c.units, (3, max(U)), generator=g)
    units[torch.arange(max(U)) >= torch.tensor(U)[:, None]] = IGNORE
    text = torch.randint(c.vocab, (3, max(N)), generator=g)
    audio = torch.randn(3, max(N), c.audio_dim, generator=g)
    return text, keep, audio, torch.randn(3, c.speaker_dim, generator=g), units


def item(b: int, text: Tensor, keep: Tensor, audio: Tensor, speaker: Tensor, units: Tensor):  # type: ignore[no-untyped-def]
    """Item b alone, without any padding."""
    n, u = int(keep[b].sum()), int((units[b] != IGNORE).sum())
    one = slice(b, b + 1)
    return text[one, :n], None, audio[one, :n], speaker[one], units[one, :u]


# parity


def test_golden_branches_and_prompt() -> None:
    model, g = golden()
    ids, keep, audio, speaker, _ = golden_batch()
    assert close(model.text_out(model.text(model.text_embed(ids)))[keep], g["text_encoded"][keep])
    assert close(model.fuse(ids, keep, audio)[keep], g["fused"][keep])
    encoded = model.audio_out(model.audio(model.audio_in(audio)))
    assert close(encoded[keep], g["audio_encoded"][keep])
    voice = model.speaker(torch.nn.functional.normalize(speaker, dim=-1))
    assert close(voice, g["speaker_projected"].view_as(voice))
    x, kept = model.prompt(ids, keep, audio, speaker)
    units = g["speech_token_lengths"]
    assert torch.equal(kept.sum(1) + units, g["lm_input_lengths"].long())
    for row, real, theirs in zip(x, kept, g["lm_input"], strict=True):
        assert close(row[real], theirs[: int(real.sum())])


@pytest.mark.parametrize("text_only", [False, True])
def test_golden_logits(text_only: bool) -> None:
    model, g = golden()
    ids, keep, audio, speaker, units = golden_batch()
    out = model(ids, keep, None if text_only else audio, speaker, units)
    theirs = g["logits_text_only" if text_only else "logits"][g["labels"] != IGNORE]
    assert close(out.logits[out.target != IGNORE], theirs)
    assert torch.equal(out.target[out.target != IGNORE], g["labels"][g["labels"] != IGNORE])
    if not text_only:
        odds, target = out.logits[out.target != IGNORE].log_softmax(-1), theirs.shape[1] - 1
        smooth = torch.full_like(odds, 0.1 / target)  # an option that no published recipe takes
        smooth.scatter_(1, out.target[out.target != IGNORE][:, None], 0.9)
        divergence = torch.nn.functional.kl_div(odds, smooth, reduction="sum") / len(odds)
        assert close(divergence, g["loss_label_smoothing_0p1"])
        assert close(out.loss * len(odds) / len(ids), g["loss_batch_normalised"])
        assert close(out.loss, g["loss"])
        assert close(out.accuracy, g["accuracy"])


def test_golden_generation() -> None:
    model, g = golden()
    ids, keep, audio, speaker, _ = golden_batch()
    n = int(keep[0].sum())
    units, stopped = model.generate(ids[:1, :n], None, audio[:1, :n], speaker[:1], greedy=True)
    assert torch.equal(units[0], g["gen_greedy_tokens"][0].long())
    assert not stopped.any()
    out = model(ids[:1, :n], None, audio[:1, :n], speaker[:1], units[0][None])
    assert close(out.logits[0, :-1], g["gen_greedy_teacher_forced_logits"])
    batched, _ = model.generate(ids, keep, audio, speaker, greedy=True)  # beside shorter, longer
    assert torch.equal(batched[0], units[0])
    assert [len(u) for u in batched] == [20 * (n + 3) for n in keep.sum(1).tolist()]


def test_golden_generation_stops_at_the_published_minimum() -> None:
    model, g = golden()
    ids, keep, audio, speaker, _ = golden_batch()
    n = int(keep[0].sum())
    old = model.head.bias[-1].item()
    with torch.no_grad():
        model.head.bias[-1] = 1e4  # EOS always wants to win
        args = ids[:1, :n], None, audio[:1, :n], speaker[:1]
        units, stopped = model.generate(*args, greedy=True)
        drawn, _ = model.generate(*args, rng=torch.Generator().manual_seed(0))
        model.head.bias[-1] = old
    assert torch.equal(units[0], g["gen_eos_bias_tokens"][0].long())
    assert stopped.all()
    assert len(drawn[0]) == 20  # the published loop of rejections would not return here


def test_the_published_size() -> None:
    with torch.device("meta"):
        model = UnitDecoder(UnitDecoderConfig())
    assert sum(p.numel() for p in model.parameters()) == 153_422_339


def test_names_fit_the_published_checkpoint() -> None:
    manifest = Path(__file__).parents[2] / "shared" / "manifests" / "manifest_taste.json"
    if not manifest.exists():
        pytest.skip("needs the list of the published keys, shared/manifests/manifest_taste.json")
    with torch.device("meta"):
        model = UnitDecoder(UnitDecoderConfig())
        public = json.loads(manifest.read_text())["tensors"]
        ours = rename({k: torch.empty(v["shape"]) for k, v in public.items()}, NAMES, SKIP)
    wanted = {k: v.shape for k, v in model.state_dict().items()}
    assert {k: v.shape for k, v in ours.items()} == wanted


@pytest.mark.parametrize(("n", "t"), [(1, 1), (6, 6), (1, 9), (3, 8)])
def test_attention_is_the_closed_form(n: int, t: int) -> None:
    torch.manual_seed(n + t)
    C, H = 16, 2
    attn = RelativeAttention(C, H)
    torch.nn.init.normal_(attn.bias_u)
    torch.nn.init.normal_(attn.bias_v)
    x = torch.randn(1, t, C)
    distance = attn.pos(sinusoids(t, C, x.device)).view(t, H, -1).transpose(0, 1)
    ours, weights = attn(x, distance, torch.ones(t, t, dtype=torch.bool).tril(), None)
    ours = ours[0, t - n :]
    q, k, v = (f(x)[0].view(t, H, -1) for f in (attn.q, attn.k, attn.v))
    w = 10000 ** (-torch.arange(0, C, 2) / C)
    rows = []
    for i in range(t - n, t):
        r = (i - torch.arange(i + 1))[:, None]
        R = torch.stack([(r * w).sin(), (r * w).cos()], -1).view(i + 1, C)
        position = ((q[i] + attn.bias_v) * attn.pos(R).view(i + 1, H, -1)).sum(-1)
        score = ((q[i] + attn.bias_u) * k[: i + 1]).sum(-1) + position  # (keys, H)
        weight = (score / (C // H) ** 0.5).softmax(0)
        assert close(weights[0, :, i, : i + 1], weight.T)
        rows.append((weight[..., None] * v[: i + 1]).sum(0).flatten())
    assert close(ours, attn.out(torch.stack(rows)))


def test_by_key_aligns_distances_with_keys() -> None:
    n, t = 3, 7
    by_distance = torch.arange(t - 1.0, -1, -1).expand(2, 1, n, t)  # its value is the distance
    i, j = torch.arange(t - n, t)[:, None], torch.arange(t)
    assert torch.equal(by_key(by_distance)[..., j <= i], (i - j).float()[j <= i].expand(2, 1, -1))


# contract


def test_start_of_training_is_near_chance_and_public_init() -> None:
    torch.manual_seed(0)
    model = UnitDecoder(TINY)
    assert model.get_parameter("lm.blocks.0.fc1.weight").std().item() == pytest.approx(
        0.02, rel=0.05
    )
    assert model.unit_embed.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.head.bias.any()


def test_gradient_reaches_every_parameter() -> None:
    model, (text, keep, audio, speaker, units) = tiny(), batch()
    model.zero_grad()
    model(text, keep, audio, speaker, units).loss.backward()
    flat = [k for k, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6]
    assert all(k.endswith("attn.k.bias") for k in flat), flat  # cancels in the softmax
    model.zero_grad()
    model(text, keep, None, speaker, units).loss.backward()
    dead = {k.split(".")[0] for k, p in model.named_parameters() if p.grad is None}
    assert dead == {"audio_in", "audio", "audio_out", "mix"}


def test_it_learns_to_say_a_sentence_and_to_stop() -> None:
    torch.manual_seed(0)
    model = UnitDecoder(replace(TINIER, dropout=0.0))
    text, keep, audio, speaker, units = batch()
    opt = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(120):
        loss = model(text, keep, audio, speaker, units).loss
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss.item() < 0.1
    said, stopped = model.eval().generate(text, keep, audio, speaker, greedy=True, min_len=0)
    assert [u.tolist() for u in said] == [u[u != IGNORE].tolist() for u in units]
    assert stopped.all()


def test_accuracy_counts_eos_and_unit_accuracy_does_not() -> None:
    out = tiny()(*batch())
    out.logits = torch.nn.functional.one_hot(out.target.clamp(min=0), TINIER.units + 1).float()
    out.logits[0, 0] = out.logits[0, 0].roll(1)  # one unit wrong of 13, and 3 EOS right
    assert out.accuracy.item() == pytest.approx(15 / 16)
    assert out.unit_accuracy.item() == pytest.approx(12 / 13)
    assert not out.correct[out.target == IGNORE].any()


# property


@pytest.mark.parametrize("t", [0, 3, 8])
def test_a_unit_changes_only_what_comes_after_it(t: int) -> None:
    args = batch()
    other = args[4].clone()
    other[1, t] = (other[1, t] + 7) % TINIER.units
    before, after = tiny()(*args).logits, tiny()(*args[:4], other).logits
    assert torch.equal(before[1, : t + 1], after[1, : t + 1])  # these predict units 0..t
    assert (before[1, t + 1 :] - after[1, t + 1 :]).abs().amax(-1).gt(1e-4).all()
    assert torch.equal(before[0], after[0])


def test_later_text_does_not_change_earlier_text() -> None:
    text, keep, audio, _, _ = batch()
    changed = text.clone()
    changed[2, 4] = (changed[2, 4] + 1) % TINIER.vocab
    before, after = tiny().fuse(text, keep, audio), tiny().fuse(changed, keep, audio)
    assert torch.equal(before[2, :4], after[2, :4])
    assert not torch.allclose(before[2, 4:], after[2, 4:])


def test_units_of_zeros_keep_their_length() -> None:
    text, keep, audio, speaker, units = batch()
    zeros = units.masked_fill(units != IGNORE, 0)
    out = tiny()(text, keep, audio, speaker, zeros)
    assert (out.target != IGNORE).sum(1).tolist() == [u + 1 for u in U]
    assert [row[u].item() for row, u in zip(out.target, U, strict=True)] == [TINIER.units] * 3


def test_padding_does_not_leak() -> None:
    text, keep, audio, speaker, units = batch()
    out = tiny()(text, keep, audio, speaker, units)
    real = out.target != IGNORE
    other = text.masked_fill(~keep, -1), keep, audio.masked_fill(~keep[..., None], torch.nan)
    more = torch.nn.functional.pad(units, (0, 5), value=IGNORE)
    again = tiny()(*other, speaker, more)
    assert close(again.logits[:, :-5][real], out.logits[real], 1e-6)
    assert close(again.loss, out.loss, 1e-6)


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("b", range(3))
def test_batch_gives_what_single_items_give(b: int, text_only: bool) -> None:
    text, keep, audio, speaker, units = batch(b)
    out = tiny()(text, keep, None if text_only else audio, speaker, units)
    text, nothing, audio, speaker, units = item(b, *batch(b))
    single = tiny()(text, nothing, None if text_only else audio, speaker, units)
    assert close(out.logits[b, : U[b] + 1], single.logits[0])
    assert len(out.maps) == TINIER.lm_blocks
    for many, one in zip(out.maps, single.maps, strict=True):
        assert one[0].shape == (TINIER.heads, U[b] + 1, N[b])
        assert close(many[b, :, : U[b] + 1, : N[b]], one[0])
    assert out.target[b, : U[b] + 1].tolist() == single.target[0].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_generation_is_greedy_decoding_without_cache_or_batch(seed: int) -> None:
    model, (text, keep, audio, speaker, _) = tiny(seed), batch(seed)
    said, stopped = model.generate(text, keep, audio, speaker, greedy=True, max_ratio=4.0)
    for b, units in enumerate(said):
        L = N[b] + 3
        prompt = item(b, *batch(seed))[:4]
        so_far = torch.zeros(1, 0, dtype=torch.long)
        while so_far.shape[1] < 4 * L:
            logits = model(*prompt, so_far).logits[0, -1]
            if so_far.shape[1] < 2 * L:
                logits = logits[:-1]
            if (unit := logits.argmax()) == TINIER.units:
                break
            so_far = torch.cat([so_far, unit.view(1, 1)], 1)
        assert units.tolist() == so_far[0].tolist()
        assert stopped[b] == (len(units) < 4 * L)


def test_to_reach_the_limit_is_not_to_stop() -> None:
    model = UnitDecoder(TINIER).eval()
    torch.nn.init.constant_(model.head.bias[-1:], 1e4)  # EOS as soon as it may
    said, stopped = model.generate(*batch()[:4], greedy=True, min_ratio=2.0, max_ratio=2.0)
    assert [len(u) for u in said] == [2 * (n + 3) for n in N]
    assert not stopped.any()
    said, stopped = model.generate(*batch()[:4], greedy=True, min_ratio=1.0, max_ratio=2.0)
    assert [len(u) for u in said] == [n + 3 for n in N]
    assert stopped.all()


def test_cached_equals_uncached() -> None:
    x, keep = torch.randn(2, 9, 24), torch.ones(2, 9, dtype=torch.bool)
    keep[0, :4] = False  # padded left, as prompts are
    whole, past = tiny().lm(x, keep), tiny().lm.past(12)
    parts = [tiny().lm(x[:, a:b], keep[:, :b], past) for a, b in ((0, 6), (6, 7), (7, 9))]
    assert close(torch.cat(parts, 1)[keep], whole[keep])


def test_masked_history_hides_the_unit_and_nothing_else() -> None:
    args, hear = batch(), torch.ones(3, max(U), dtype=torch.bool)
    other = args[4].clone()
    other[1, 3] = (other[1, 3] + 1) % TINIER.units
    plain = tiny()(*args, history_keep=hear)
    assert torch.equal(plain.logits, tiny()(*args).logits)
    hear[1, 3] = False
    masked = tiny()(*args, history_keep=hear)
    assert not torch.allclose(masked.logits[1, 4:], plain.logits[1, 4:])
    assert torch.equal(masked.logits, tiny()(*args[:4], other, hear).logits)
    assert torch.equal(masked.target, plain.target)
    none = torch.zeros_like(hear)
    a, b = tiny()(*args, none), tiny()(*args[:4], args[4].clamp(max=0), none)
    assert torch.equal(a.logits, b.logits)


def test_the_voice_counts_and_its_loudness_does_not() -> None:
    text, keep, audio, speaker, units = batch()
    one, two = tiny()(text, keep, audio, speaker, units), tiny()(text, keep, audio, -speaker, units)
    loud = tiny()(text, keep, audio, 5 * speaker, units)
    assert close(loud.logits, one.logits)
    assert not close(two.logits, one.logits, 1e-2)


def test_one_draw_without_eos_is_the_published_rejection() -> None:
    logits = torch.tensor([[1.0, 0.5, -3.0, 0.0, 1.5]]).expand(40_000, -1)  # id 4 is EOS
    rng = torch.Generator().manual_seed(0)
    early = torch.ones(len(logits), dtype=torch.bool)
    ids = pick(logits, early, 3, 1.0, rng)  # the best three are 4, 0, 1
    odds = ids.bincount(minlength=5) / len(ids)
    wanted = torch.tensor([1.0, 0.5]).softmax(0)
    torch.testing.assert_close(odds[:2], wanted, atol=0.01, rtol=0)
    assert not odds[2:].any()
    ids = pick(logits, ~early, 3, 0.5, rng)
    wanted = torch.tensor([2.0, 1.0, 0, 0, 3.0]).softmax(0) * torch.tensor([1, 1, 0, 0, 1])
    torch.testing.assert_close(
        ids.bincount(minlength=5) / len(ids), wanted / wanted.sum(), atol=0.01, rtol=0
    )
    assert pick(logits[:1], early[:1], 1, 1.0, rng).item() == 0


def test_draws_follow_the_generator() -> None:
    text, keep, audio, speaker, _ = batch()

    def draw(seed: int) -> list[list[int]]:
        rng = torch.Generator().manual_seed(seed)
        said, _ = tiny().generate(text, keep, audio, speaker, rng=rng, min_len=5, max_len=9)
        return [u.tolist() for u in said]

    assert draw(0) == draw(0) != draw(1)
    assert all(5 <= len(u) <= 9 for u in draw(0))


def test_autocast_changes_little_and_keeps_logits_fp32() -> None:
    out = tiny(0, 2.0)(*batch())
    with torch.autocast("cpu", torch.bfloat16):
        low = tiny(0, 2.0)(*batch())
        said, _ = tiny(0, 2.0).generate(*batch()[:4], greedy=True, max_len=20)
    assert low.logits.dtype == low.loss.dtype == torch.float32
    assert close(low.logits, out.logits, 0.1)
    assert len(said) == 3


# failure


def test_rejects_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"width=20 must be a multiple of 2 \* heads=8"):
        replace(TINIER, width=20)
    with pytest.raises(ValueError, match=r"at least 1 .*lm_blocks=0"):
        replace(TINIER, lm_blocks=0)
    with pytest.raises(ValueError, match=r"in \[0, 1\), got .*dropout=1\.0"):
        replace(TINIER, dropout=1.0)


def test_rejects_inputs_that_do_not_fit() -> None:
    model, (text, keep, audio, speaker, units) = tiny(), batch()
    with pytest.raises(ValueError, match=r"units 3\.\.20 with 0 gaps: wanted 0\.\.19.*no EOS"):
        model(text, keep, audio, speaker, torch.tensor([[3, 20]] * 3))
    with pytest.raises(ValueError, match="with 3 gaps: wanted"):
        model(text, keep, audio, speaker, torch.tensor([[3, -1, 5]] * 3))
    with pytest.raises(ValueError, match="padding only on the right"):
        model(text, keep.flip(1), audio, speaker, units)
    with pytest.raises(ValueError, match="each item needs a token"):
        model(text, keep & False, audio, speaker, units)
    with pytest.raises(ValueError, match=r"audio: shape \[3, 6, 12\], wanted \[3, 7, 12\]"):
        model(text, keep, audio[:, 1:], speaker, units)
    with pytest.raises(ValueError, match=r"speaker: shape \[3, 5\], wanted \[3, 6\]"):
        model(text, keep, audio, speaker[:, 1:], units)


def test_rejects_settings_of_generation_that_cannot_be() -> None:
    prompt = batch()[:4]
    with pytest.raises(ValueError, match="got 0, 25"):
        tiny().generate(*prompt, temperature=0)
    with pytest.raises(ValueError, match=r"no length between \[9, 9, 9\] and \[5, 5, 5\]"):
        tiny().generate(*prompt, min_len=9, max_len=5)
    with pytest.raises(ValueError, match=r"\.eval\(\)"):
        UnitDecoder(TINIER).generate(*prompt)
