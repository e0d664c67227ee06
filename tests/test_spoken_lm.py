"""spoken_lm.py against the golden files of the public system, and against itself uncached."""

import itertools
import json
import math
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import continuation
from continuation import (
    Generated,
    Prompt,
    Sampling,
    VocabularySets,
    generate,
    narrow,
    next_text,
    penalize,
    prompt_ids,
)
from fsq import FSQ, FSQConfig
from llm import Llama, LlamaConfig
from lora import lora_layers, merge
from rvq import NAMES as RVQ_NAMES
from rvq import RVQ, RVQConfig
from rvq import SKIP as RVQ_SKIP
from spoken_lm import (
    IGNORE,
    TINY,
    SpokenLM,
    SpokenLMConfig,
    SpokenLMOutput,
    TokenHead,
    from_public,
    layout,
)
from text import SentencePieceTokenizer, train_sentencepiece
from weights import load_strict, rename

GOLDEN = Path(__file__).parent / "golden" / "taste"
LLAMA = LlamaConfig(
    vocab=96, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=64, rope_bf16=True
)
CONFIG = SpokenLMConfig(
    LLAMA, sos=90, lora_rank=4, lora_alpha=8, audio_dim=32, n_codes=24, latent_dim=16
)
BOOKS = RVQConfig(dim=32, codebook_dim=16, codebook_size=24)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def part(file: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in file.items() if k.startswith(prefix)}


def public_rvq(tensors: dict[str, Tensor]) -> RVQ:
    rvq = RVQ(BOOKS)
    load_strict(rvq, rename(tensors, RVQ_NAMES, RVQ_SKIP))
    return rvq.eval()


def per_word(g: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The public layout (codes on the first token of each word) -> ids, word ids, codes."""
    length = g["llm_token_lengths"][:, None]
    ids, here = g["llm_token_ids"], torch.arange(g["llm_token_ids"].shape[1])
    word_ids = g["llm_word_ids"].long().masked_fill(here >= length, IGNORE)
    codes = torch.full((len(ids), int(word_ids.max()) + 1, 4), IGNORE)
    first = (word_ids >= 0) & (g["llm_indices"][..., 0] != -1)
    for b, n in first.nonzero().tolist():
        codes[b, word_ids[b, n]] = g["llm_indices"][b, n]
    return ids, word_ids, codes


@pytest.fixture(scope="module")
def latent() -> tuple[SpokenLM, dict[str, Tensor]]:
    g = load_file(GOLDEN / "taslm_latent.safetensors")
    rvq = public_rvq(part(g, "weights.vq."))
    return from_public(part(g, "weights.spoken_lm."), CONFIG, rvq), g


def test_layout_rows_and_hidden_are_the_public_ones(latent: tuple) -> None:
    model, g = latent
    ids, word_ids, codes = per_word(g)
    out = model(ids, word_ids, codes, faithful=True)
    keep = g["attention_mask"].bool()
    assert torch.equal(out.layout.keep, keep)
    assert torch.equal(out.layout.text_labels, g["text_labels"])
    assert torch.equal(out.layout.code_labels, g["taste_labels"])
    close(model.rows(out.layout, codes)[keep], g["inputs_embeds"][keep])
    close(out.hidden[keep], g["last_hidden"][keep])
    close(out.text_logits[keep], g["text_logits"][keep])
    mu = model.head(out.hidden)
    close(mu[keep], g["mu"][keep])
    close(model.head.latent(mu)[keep], g["z"][keep])
    close(model.head.logvar, g["logvar"])
    said = model.head.say(out.hidden, model.quantizer, 0, None)
    assert torch.equal(said[keep], g["taste_pred"][keep])
    assert torch.equal(keep.sum(1), g["output_lengths"].long())
    asked = out.layout.code_labels[..., 0] != IGNORE
    target = model.quantizer.latent(out.layout.code_labels[asked])
    close(target, g["taste_target_code"])
    close(out.loss, g["loss_without_ref_model"])


def test_losses_and_gradients_are_the_public_ones(latent: tuple) -> None:
    model, g = latent
    ids, word_ids, codes = per_word(g)
    out = model(ids, word_ids, codes, reference=True, faithful=True)
    close(out.text_ce, g["text_ce"])
    close(out.text_kl, g["text_kl"])
    close(out.code_loss, 0.5 * g["l_reg"] + 0.5 * g["l_kl"])
    close(out.loss, g["loss_with_ref_model"])
    keep = g["attention_mask"].bool()[:, :10]
    close(model.reference(ids)[keep], g["ref_text_logits"][keep])
    model.zero_grad()
    model(ids, word_ids, codes, faithful=True).loss.backward()
    grads = {
        "pad_text_unit_embed": model.pad_text,
        "pad_audio_unit_embed": model.pad_audio,
        "fuse_for_bridge_in_llm.weights": model.weights,
        "fuse_for_bridge_in_llm.linear.weight": model.audio.weight,
        "extract_for_bridge_out_llm.fc_mu.weight": model.head.mu.weight,
        "extract_for_bridge_out_llm.b_logvar": model.head.logvar,
    }
    lm = "language_model.base_model.model.model.layers"
    grads[f"{lm}.0.mlp.down_proj.lora_A.default.weight"] = model.llm.layers[0].ffn.down.A
    grads[f"{lm}.1.self_attn.q_proj.lora_B.default.weight"] = model.llm.layers[1].attention.q.B
    for name, p in grads.items():
        close(p.grad, g[f"grad.{name}"], 1e-4)


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_longer_delays_are_the_public_ones(latent: tuple, delay: int) -> None:
    model, g = latent
    d = part(load_file(GOLDEN / "taslm_delay_layouts.safetensors"), f"delay{delay}.")
    ids, word_ids, codes = (x[:3] for x in per_word(g))
    plan = layout(ids, word_ids, codes, delay)
    keep = d["attention_mask"].bool()
    assert torch.equal(plan.keep, keep)
    assert torch.equal(plan.code_labels, d["taste_labels"])
    close(model.rows(plan, codes)[keep], d["inputs_embeds"][keep])


@pytest.mark.parametrize("kind", ["linear_last", "multi_linear_last"])
def test_token_heads_are_the_public_ones(kind: str) -> None:
    file = load_file(GOLDEN / "taslm_token_heads.safetensors")
    g, rvq = part(file, f"{kind}."), public_rvq(part(file, "weights.vq."))
    head = TokenHead(32, 4, 24, mse=kind == "multi_linear_last")
    load_strict(head, {k: v for k, v in part(g, "weights.").items() if k != "b_logvar"})
    close(head(file["hidden"]), g["logits"])
    said = file["taste_labels"][..., 0] != IGNORE
    close(head.loss(file["hidden"][said], file["taste_labels"][said], rvq), g["taste_loss"])


# ---- generation


class Toy:
    """The vocabulary of the golden traces."""

    def __init__(self) -> None:
        self.special: dict[str, int] = {}
        self.texts = json.loads((GOLDEN / "gen_zero_greedy.json").read_text())["toy_llm_vocab"]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.texts[i] if i < len(self.texts) else "#" for i in ids)


def full_model(short: bool) -> SpokenLM:
    """The model of the traces. short: a vocabulary of the 48 tokens whose rows are not zero, sos
    as the last of them; those traces cannot tell, because all the rest is banned."""
    g = load_file(GOLDEN / "full_weights.safetensors")
    tensors = part(g, "spoken_lm.")
    table = "language_model.base_model.model.model.embed_tokens.weight"
    rows, row_ids = tensors.pop(f"{table}.rows"), tensors.pop(f"{table}.row_ids")
    assert row_ids.tolist() == [*range(47), 128000]
    vocab, sos = (48, 47) if short else (128256, 128000)
    at = torch.arange(48) if short else row_ids
    tensors[table] = torch.zeros(vocab, 32).index_copy(0, at, rows)
    config = replace(CONFIG, llm=replace(LLAMA, vocab=vocab), sos=sos)
    return from_public(tensors, config, public_rvq(part(g, "audio_tower.vq.")))


@pytest.fixture(scope="module")
def full() -> tuple[SpokenLM, VocabularySets, dict[str, Tensor]]:
    sets = VocabularySets.of(Toy(), 48, faithful=True)
    return full_model(short=True), sets, load_file(GOLDEN / "full_forward.safetensors")


def test_whole_vocabulary_forward_is_the_public_one() -> None:
    model, g = full_model(short=False), load_file(GOLDEN / "full_forward.safetensors")
    out = model(*per_word(g), faithful=True)
    keep = out.layout.keep
    close(out.loss, g["taslm_loss"])
    close(out.text_logits[keep][:, g["used_rows"]], g["taslm_text_logits_used_rows"][keep])
    said = model.head.say(out.hidden, model.quantizer, 0, None)
    assert torch.equal(said[keep], g["taslm_taste_pred"][keep])


def golden_prompt(mode: str, g: dict[str, Tensor], trace: dict[str, Tensor]) -> Prompt:
    ids, word_ids, codes = (x[0, :6] for x in per_word(g))
    match mode:
        case "zero":
            return Prompt()
        case "text":
            return Prompt(ids)
        case "audio":
            return Prompt(ids, word_ids, codes[:4])
    around = trace["instruct_prefix_ids"], trace["instruct_suffix_ids"]
    return Prompt(ids, word_ids, codes[:4], *around)


def check_trace(name: str, out: Generated, trace: dict[str, Tensor]) -> None:
    assert torch.equal(out.ids, trace["generated_llm_token_ids"][0])
    assert torch.equal(out.word_ids, trace["generated_llm_word_ids"][0].long())
    theirs = trace["generated_llm_indices"][0]
    assert torch.equal(out.codes, theirs[theirs[:, 0] != -1])
    assert out.text == json.loads((GOLDEN / f"{name}.json").read_text())["generated_text"]
    assert out.words == out.text.split()
    assert out.ended


@pytest.mark.parametrize("mode", ["zero", "text", "audio", "instruct"])
def test_greedy_traces_are_the_public_ones(full: tuple, mode: str) -> None:
    model, sets, g = full
    trace = load_file(GOLDEN / f"gen_{mode}_greedy.safetensors")
    sampling = Sampling(top_p=0, faithful=True)
    out = generate(model, sets, golden_prompt(mode, g, trace), sampling, extra_words=3)
    check_trace(f"gen_{mode}_greedy", out, trace)


def test_quirk_sampled_trace_has_the_public_distributions(
    full: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sets, g = full
    trace = load_file(GOLDEN / "gen_audio_sampled.safetensors")
    probabilities = []

    def replay(logits: Tensor, temperature: float, **_: object) -> Tensor:
        probabilities.append((logits / temperature).softmax(-1)[0])
        return trace["step_text_ids"][len(probabilities) - 1][None]

    monkeypatch.setattr(continuation, "pick", replay)
    sampling = Sampling(0.7, 0.8, 1.3, faithful=True)
    out = generate(model, sets, golden_prompt("audio", g, trace), sampling, extra_words=3)
    check_trace("gen_audio_sampled", out, trace)
    close(torch.stack(probabilities), trace["step_probs_used_rows"][: len(probabilities)])


# ---- everything below: our own models, FSQ and RVQ


def tiny(
    head: str = "token", delay: int = 1, seed: int = 0, quantizer: str = "fsq", **changes: Any
) -> SpokenLM:
    """A small model with weights that are not small, so that mistakes show."""
    torch.manual_seed(seed)
    book: FSQ | RVQ = RVQ(replace(BOOKS, kmeans_iters=0))
    if quantizer == "fsq":
        book = FSQ(FSQConfig(dim=32, d=5, levels=6))
    config = SpokenLMConfig(
        replace(LLAMA, rope_bf16=False),
        sos=1,
        lora_rank=3,
        audio_dim=32,
        delay=delay,
        head=head,
        n_codebooks=book.n_codebooks,
        n_codes=book.n_codes,
        latent_dim=16,
    )
    model = SpokenLM(replace(config, **changes), book).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad or p.ndim == 2:
                p.normal_(std=0.3)
        model.llm.embed.weight.normal_()
        model.weights.zero_()
    return model


def batch(model: SpokenLM, words: list[list[int]], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """words: tokens of each word of each row -> random ids, word ids, codes."""
    rng = torch.Generator().manual_seed(seed)
    B, N, W = len(words), max(map(sum, words)), max(map(len, words))
    word_ids = torch.full((B, N), IGNORE)
    for b, sizes in enumerate(words):
        word_ids[b, : sum(sizes)] = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    codes = torch.randint(model.config.n_codes, (B, W, model.config.n_codebooks), generator=rng)
    return torch.randint(96, (B, N), generator=rng), word_ids, codes


def drawn(ids: list[int], word_ids: list[int], delay: int) -> list[list[int]]:
    """One utterance laid out by hand, one row after the other: [text, heard, text label, asked]."""
    words = word_ids[-1] + 1
    heard = [IGNORE, *(max(w - delay, IGNORE) for w in word_ids)]
    heard += [max(words - delay + j, IGNORE) for j in range(delay)]
    text = [IGNORE, *ids] + [IGNORE] * delay
    asked = [b if b != a else IGNORE for a, b in pairwise(heard)]
    return [text, heard, [*text[1:], IGNORE], [*asked, IGNORE]]


@pytest.mark.parametrize("delay", [1, 2, 3, 4])
@pytest.mark.parametrize("sizes", [[1], [3], [1, 2], [2, 1, 3], [1, 1, 1, 1, 2]])
def test_layout_asks_for_each_word_once_when_it_is_heard_next(delay: int, sizes: list[int]) -> None:
    longer = [1, 1, 2, 2, 2]  # pads the first row
    ids, word_ids, codes = batch(tiny(), [sizes, longer])
    plan, n = layout(ids, word_ids, codes, delay), sum(sizes)
    R = n + delay + 1
    text, heard, labels, asked = drawn(ids[0, :n].tolist(), word_ids[0, :n].tolist(), delay)
    assert plan.ids[0, :R].tolist() == text
    assert plan.heard[0, :R].tolist() == heard
    assert plan.text_labels[0, :R].tolist() == labels
    want = [codes[0, w].tolist() if w >= 0 else [IGNORE] * 5 for w in asked]
    assert plan.code_labels[0, :R].tolist() == want
    assert [w for w in asked if w != IGNORE] == [*range(len(sizes))]
    assert plan.keep[0].tolist() == [True] * R + [False] * (plan.keep.shape[1] - R)
    for part_ in (plan.ids, plan.heard, plan.text_labels, plan.code_labels):
        assert (part_[0, R:] == IGNORE).all()


@pytest.mark.parametrize("delay", [1, 2])
def test_codes_of_a_word_change_nothing_before_they_are_heard(delay: int) -> None:
    model = tiny(delay=delay)
    ids, word_ids, codes = batch(model, [[2, 1, 3, 1]])
    out = model(ids, word_ids, codes)
    for word in range(4):
        other = codes.clone()
        other[:, word] = (other[:, word] + 1) % model.config.n_codes
        hidden = model(ids, word_ids, other).hidden
        first = int((out.layout.heard[0] == word).nonzero()[0])
        assert torch.equal(hidden[:, :first], out.hidden[:, :first])
        assert not torch.allclose(hidden[:, first], out.hidden[:, first])


def test_padded_batch_gives_what_single_items_give() -> None:
    model = tiny(delay=2)
    words = [[2, 1, 3], [1], [1, 1, 1, 4]]
    ids, word_ids, codes = batch(model, words)
    together = model(ids, word_ids, codes)
    scores = model.score(ids, word_ids, codes)
    for b, sizes in enumerate(words):
        n = sum(sizes)
        one = ids[b : b + 1, :n], word_ids[b : b + 1, :n], codes[b : b + 1, : len(sizes)]
        alone = model(*one)
        close(together.hidden[b, : n + 3], alone.hidden[0])
        for whole, single in zip(scores, model.score(*one), strict=True):
            close(whole[b], single[0])
        close(model.score(*one)[0][0], -alone.text_ce * n)
        close(model.score(*one)[1][0], -alone.code_loss * len(sizes) * 5)


@pytest.mark.parametrize("quantizer", ["fsq", "rvq"])
def test_token_head_without_weights_gives_the_uniform_loss(quantizer: str) -> None:
    model = tiny(quantizer=quantizer)
    for p in model.head.parameters():
        torch.nn.init.zeros_(p)
    loss = model(*batch(model, [[2, 1], [3, 1, 1]])).code_loss
    assert abs(loss.item() - math.log(model.config.n_codes)) < 1e-5


def test_latent_likelihood_is_that_of_a_gaussian() -> None:
    model: Any = tiny("latent", quantizer="rvq")
    ids, word_ids, codes = batch(model, [[2, 1, 1]])
    out = model(ids, word_ids, codes)
    said = out.layout.code_labels[..., 0] != IGNORE
    mu, sigma = model.head(out.hidden[said]), (0.5 * model.head.logvar).exp()
    want = torch.distributions.Normal(mu, sigma).log_prob(model.quantizer.latent(codes)[0]).sum()
    close(model.score(ids, word_ids, codes)[1][0], want)


@pytest.mark.parametrize(
    ("head", "quantizer"), [("token", "fsq"), ("latent", "rvq"), ("token_mse", "rvq")]
)
def test_only_lora_bridges_and_pads_learn_and_are_saved(head: str, quantizer: str) -> None:
    model = tiny(head, quantizer=quantizer, delay=2).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".attention.q." in name:  # a softmax that is certain passes no gradient
                p.mul_(0.1)
    model(*batch(model, [[2, 1, 2]]), reference=True).loss.backward()
    for name, p in model.named_parameters():
        learns = name.endswith((".A", ".B")) or not name.startswith(("llm.", "quantizer."))
        assert p.requires_grad == learns
        assert (p.grad is not None and bool(p.grad.any())) == learns, name
    assert not model.quantizer.training
    saved = {k: v + 1 for k, v in model.state_to_save().items()}
    other = tiny(head, quantizer=quantizer, delay=2)
    other.load_saved(saved)
    assert all(torch.equal(v, saved[k]) for k, v in other.state_to_save().items())
    with pytest.raises(ValueError, match=r"in the model, not in the file"):
        other.load_saved({"weights": saved["weights"]})


def test_quirk_training_latent_moves_like_mu_plus_sigma() -> None:
    head: Any = tiny("latent", quantizer="rvq").head.train()
    mu = torch.zeros(2000, 16, requires_grad=True)
    z = head.latent(mu)
    close(z.std(0), (0.5 * head.logvar).exp().detach(), 0.1)
    assert z.mean(0).abs().max() < 0.1 * z.std(0).max()
    grad_mu, grad_var = torch.autograd.grad(z.sum(), (mu, head.logvar))
    assert torch.equal(grad_mu, torch.ones_like(mu))
    close(grad_var, 2000 * 0.5 * (0.5 * head.logvar).exp().detach())


def test_reference_is_the_lm_without_lora_and_leaves_no_trace() -> None:
    model = tiny(llm=LLAMA)  # Quirk: bf16 frequencies in our LM, exact ones in the reference
    ids = torch.randint(96, (2, 80))
    plain = Llama(replace(LLAMA, rope_bf16=False)).eval()
    state = part(model.state_dict(), "llm.")
    names = {k: k.replace(".base.", ".") for k in state if not k.endswith((".A", ".B"))}
    load_strict(plain, {new: state[old] for old, new in names.items()})
    before = model.llm(ids).detach()
    want = plain.logits(plain(torch.cat([torch.ones(2, 1, dtype=torch.long), ids], 1)))
    close(model.reference(ids), want.detach())
    assert torch.equal(model.llm(ids), before)
    merge(model.llm)
    merged = [layer.merged for layer in lora_layers(model.llm)]
    close(model.reference(ids), want.detach())
    for layer, own in zip(lora_layers(model.llm), merged, strict=True):
        assert layer.merged is own


def note(seen: list[int], _: object, args: tuple[Tensor, ...]) -> None:
    seen.append(args[0].shape[1])


def plain_sets() -> VocabularySets:
    """96 tokens: two specials, a lone space, word starts, word ends, and two full stops."""
    toy = Toy()
    toy.texts = ["<s>", "</s>", " ", ".", *(f" {c}{i}" for i, c in enumerate("abcdefgh"))]
    toy.texts += [f"x{i}" for i in range(94 - len(toy.texts))] + [" end.", "\n"]
    toy.special = {"<s>": 0, "</s>": 1}
    return VocabularySets.of(toy, 96)


def test_plain_sets_ban_what_is_no_text() -> None:
    sets = plain_sets()
    assert sets.banned.nonzero().flatten().tolist() == [0, 1, 95]
    assert sets.word_start.nonzero().flatten().tolist() == [2, *range(4, 12), 94]
    assert sets.sentence_end.nonzero().flatten().tolist() == [3, 94]
    assert sets.blank.nonzero().flatten().tolist() == [2]


def test_sets_of_a_sentencepiece_vocabulary() -> None:
    line = "the quiet captain saw seven ships near the old harbor."
    pieces = SentencePieceTokenizer(train_sentencepiece([line], 300))
    sets = VocabularySets.of(pieces, pieces.vocab_size + 4)
    for i in pieces.encode(" the captain saw ships."):
        assert not sets.banned[i]
    for word in line.split():
        starts = [bool(sets.word_start[i]) for i in pieces.encode(" " + word)]
        assert starts == [True] + [False] * (len(starts) - 1)
    assert all(sets.banned[i] for i in pieces.special.values())
    assert sets.banned[pieces.unk]
    assert sets.banned[-4:].all()  # the LM has ids that the tokenizer lacks
    assert not sets.banned[sets.blank].any()


CASES = [("token", "fsq"), ("token", "rvq"), ("latent", "rvq")]


@pytest.mark.parametrize("delay", [1, 2, 3])
@pytest.mark.parametrize(("head", "quantizer"), CASES)
@pytest.mark.parametrize("prompted", [False, True])
def test_cached_generation_is_what_a_full_forward_predicts(
    head: str, quantizer: str, delay: int, prompted: bool
) -> None:
    """One uncached pass over prompt and answer, laid out as in training, predicts the answer."""
    sets = plain_sets()
    seen: list[int] = []  # rows in each call of the Llama
    for seed in range(2):
        model = tiny(head, delay, seed, quantizer)
        ids, word_ids, codes = (x[0] for x in batch(model, [[1, 2]], seed))
        prompt = Prompt(ids, word_ids, codes) if prompted else Prompt()
        model.llm.layers[0].register_forward_pre_hook(partial(note, seen))
        out = generate(model, sets, prompt, Sampling(0.0, repetition_penalty=1.0), 2)
        assert seen == [4 if prompted else 1] + [1] * (len(out.ids) + delay - 1)
        seen.clear()
        n = 3 if prompted else 0
        if prompted:
            ids, codes = torch.cat([ids, out.ids]), torch.cat([codes, out.codes])
            word_ids = torch.cat([word_ids, out.word_ids + 2])
        else:
            ids, word_ids, codes = out.ids, out.word_ids, out.codes
        whole = model(ids[None], word_ids[None], codes[None])
        seen.clear()
        check_answer(model, whole, out, n, sets)


def check_answer(
    model: SpokenLM, whole: SpokenLMOutput, out: Generated, n: int, sets: VocabularySets
) -> None:
    """n: tokens of the prompt. Text and codes of the answer are the argmax of one forward."""
    for i, token in enumerate(out.ids.tolist()):
        never = sets.banned
        if i > 0 and sets.blank[out.ids[i - 1]]:
            never = never | sets.word_start
        elif n and (out.word_ids[:i] < 0).all():  # no new word yet
            never = never | ~(sets.word_start if i else sets.word_start | sets.sentence_end)
        logits = whole.text_logits[0, n + i].masked_fill(never, -torch.inf)
        assert int(logits.argmax()) == token
    labels = whole.layout.code_labels[0]
    asked = (labels[:, 0] != IGNORE).nonzero()[-len(out.codes) :, 0]
    said = model.head.say(whole.hidden[0, asked], model.quantizer, 0.0, None)
    assert torch.equal(said, out.codes)


def test_an_answer_may_end_the_last_word_but_not_lengthen_it() -> None:
    model, sets = tiny(), plain_sets()
    ids, word_ids, codes = (x[0] for x in batch(model, [[1, 2]], 0))
    prompts = Prompt(ids, word_ids, codes), Prompt(ids)
    glues = []
    for seed, prompt in itertools.product(range(40), prompts):
        rng = torch.Generator().manual_seed(seed)
        out = generate(model, sets, prompt, Sampling(9.0, 1.0, 1.0, 1.0), 2, rng=rng)
        assert sets.word_start[out.ids[0]] or out.ids[0] == 3
        assert (out.glue == ".") == (out.word_ids[0] == -1) == (out.ids[0] == 3)
        assert out.word_ids[len(out.glue) :].min() == 0
        assert len(out.words) == len(out.codes) == out.word_ids.max() + 1
        assert "" not in out.words
        glues.append(out.glue)
        short = generate(model, sets, prompt, Sampling(9.0, 1.0, 1.0, 1.0), 2, 1, rng)
        assert len(short.words) == 1  # no full stop, and then no time for a word
    assert {*glues} == {"", "."}


def test_generation_is_bounded_and_says_so() -> None:
    model, sets = tiny(delay=2), plain_sets()
    stuck = replace(sets, banned=sets.banned | sets.word_start | sets.sentence_end)
    out = generate(model, stuck, extra_words=2)
    assert not out.ended
    assert len(out.ids) == 16 * 3 * 2
    assert len(out.words) == len(out.codes) == 1
    short = generate(model, sets, extra_words=50, max_steps=5)
    assert not short.ended
    assert len(short.ids) == 5
    narrow_lm = tiny(llm=replace(LLAMA, rope_bf16=False, max_tokens=20))
    assert len(generate(narrow_lm, stuck).ids) == 20 - 1 - 1
    with pytest.raises(ValueError, match="no room"):
        generate(model, sets, max_steps=0)


@pytest.mark.parametrize("delay", [1, 2])
def test_a_stop_token_ends_the_text_once_a_word_is_begun(delay: int) -> None:
    model, sets = tiny(delay=delay), plain_sets()
    stop, lengths = 3, []
    for seed in range(4):
        rng = torch.Generator().manual_seed(seed)
        out = generate(model, sets, None, Sampling(9.0, 1.0, 1.0), 4, rng=rng, stop=stop)
        assert stop not in out.ids
        assert out.ended
        assert len(out.words) == len(out.codes) >= 1
        lengths.append(len(out.ids))
    assert len({*lengths}) > 1  # else it was something else that ended them
    calm = Sampling(0.0, 1.0, 1.0)
    first = int(generate(model, sets, None, calm, 2).ids[0])
    other = generate(model, sets, None, calm, 2, stop=first)  # wants to stop before all words
    assert other.ids[0] != first
    assert other.words


def test_quirk_what_the_public_penalty_counts_as_said() -> None:
    model = tiny()
    ids, word_ids, codes = (x[0] for x in batch(model, [[1, 2]]))
    ids = torch.tensor([7, 8, 9])
    around = Prompt(ids, word_ids, codes, torch.tensor([20]), torch.tensor([30, 31]))
    for prompt, faithful, fixed in (
        (Prompt(), [model.config.sos], []),
        (Prompt(ids), [7, 8, 9], [7, 8, 9]),
        (Prompt(ids, word_ids, codes), [7, 8, 9], [7, 8, 9]),
        (around, [8, 9, 20, 30, 31], [7, 8, 9, 20, 30, 31]),
    ):
        for said, rule in ((faithful, True), (fixed, False)):
            assert prompt_ids(model, prompt, rule)[0].nonzero().flatten().tolist() == said


def test_ending_waits_for_a_sentence_end_or_three_times_the_words() -> None:
    sets, model = plain_sets(), tiny()
    wild = Sampling(20.0, 1.0, 1.0)  # a random model would repeat itself for ever
    for seed in range(12):
        rng = torch.Generator().manual_seed(seed)
        out = generate(model, sets, None, wild, extra_words=2, rng=rng)
        begun = out.word_ids.tolist()  # index of the word = words begun before it, or less by one
        before = [0, *(w + 1 for w in begun[:-1])]
        over = [
            (n >= 2 and bool(sets.sentence_end[i])) or n >= 6
            for n, i in zip(before, out.ids.tolist(), strict=True)
        ]
        assert out.ended
        assert over.index(True) >= len(over) - 2  # one later if a lone space must not end it
        assert "" not in out.words
        assert out.text == " ".join(out.words) or out.text.split() == out.words
        assert len(out.words) == len(out.codes)


def test_sampling_follows_the_generator_and_code_temperature() -> None:
    model, sets = tiny(), plain_sets()

    def go(seed: int, heat: float) -> Generated:
        rng = torch.Generator().manual_seed(seed)
        return generate(model, sets, None, Sampling(1.0, 0.9, 1.1, heat), 2, rng=rng)

    assert torch.equal(go(3, 1.0).ids, go(3, 1.0).ids)
    assert torch.equal(go(3, 1.0).codes, go(3, 1.0).codes)
    assert not torch.equal(go(3, 1.0).ids, go(4, 1.0).ids)
    for heat in (0.0, 50.0):
        calm = Sampling(0.0, 1.0, 1.0, heat)
        a, b = (generate(model, sets, None, calm, 2, rng=torch.manual_seed(s)) for s in (3, 4))
        assert torch.equal(a.codes[0], b.codes[0]) == (heat == 0)


def test_a_lone_space_is_not_left_as_a_word() -> None:
    sets = plain_sets()
    sets = replace(sets, blank=sets.word_start)  # as if all word starts were spaces only
    for seed in range(4):
        rng = torch.Generator().manual_seed(seed)
        out = generate(tiny(seed=seed), sets, None, Sampling(1.0, 1.0, 1.0), 2, rng=rng)
        starts = sets.word_start[out.ids].tolist()
        assert not any(a and b for a, b in pairwise(starts))
        assert not starts[-1]


def test_quirk_public_nucleus_drops_the_token_that_crosses() -> None:
    logits, never = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log(), torch.zeros(1, 4).bool()
    public = {0.3: 1, 0.5: 1, 0.75: 1, 0.82: 2, 0.96: 3}
    for top_p, n in public.items():
        assert int(narrow(logits, top_p).isfinite().sum()) == n
        many = logits.expand(400, 4)
        torch.manual_seed(0)
        ours = next_text(many, never.expand(400, 4), Sampling(1.0, top_p, 1.0))
        assert int(ours.max()) + 1 == {0.3: 1, 0.5: 1, 0.75: 2, 0.82: 3, 0.96: 4}[top_p]
    greedy = Sampling(9.0, 0.0, 9.0, faithful=True)
    assert next_text(logits, ~never, greedy).tolist() == [0]


def test_penalty_makes_positive_and_negative_logits_less_likely() -> None:
    logits, said = torch.tensor([[2.0, 1.5, -1.0]]), torch.tensor([[True, False, True]])
    assert penalize(logits, said, 2.0).tolist() == [[1.0, 1.5, -2.0]]
    assert next_text(logits, said, Sampling(0.0, 1.0, 2.0)).tolist() == [1]


def test_bf16_base_keeps_its_dtype_and_fp32_heads() -> None:
    model = tiny()
    base = [m.base for m in lora_layers(model.llm)]
    for m in (model.llm.embed, model.llm.norm, *base):
        m.to(torch.bfloat16)
    for layer in model.llm.layers:
        layer.norm1.to(torch.bfloat16), layer.norm2.to(torch.bfloat16)
    out = model(*batch(model, [[1, 2], [2, 3]]), reference=True)
    assert out.hidden.dtype == torch.bfloat16
    assert out.code_loss.dtype == out.loss.dtype == torch.float32
    assert generate(model, plain_sets()).codes.dtype == torch.int64


def test_wrong_inputs_are_named() -> None:
    model = tiny()
    ids, word_ids, codes = batch(model, [[1, 2], [2]])
    empty = word_ids.clone().index_fill(0, torch.tensor([1]), IGNORE)
    for bad in (word_ids + 1, empty, word_ids.flip(1), word_ids * 2):
        with pytest.raises(ValueError, match="word_ids must count"):
            layout(ids, bad, codes, 1)
    with pytest.raises(ValueError, match="2 words, but codes for 1"):
        layout(ids, word_ids, codes[:, :1], 1)
    with pytest.raises(ValueError, match="needs an RVQ"):
        tiny("latent")
    with pytest.raises(ValueError, match="the quantizer has"):
        SpokenLM(TINY, RVQ(BOOKS))
    with pytest.raises(ValueError, match="latent_dim=256"):
        SpokenLM(replace(CONFIG, latent_dim=256), RVQ(BOOKS))
    with pytest.raises(ValueError, match="the given LM is"):
        SpokenLM(replace(CONFIG, sos=5), RVQ(BOOKS), Llama(replace(LLAMA, vocab=50)))
    with pytest.raises(ValueError, match="head='linear'"):
        replace(TINY, head="linear")
    with pytest.raises(ValueError, match="delay must be"):
        replace(TINY, delay=0)
    with pytest.raises(ValueError, match="sos=320"):
        replace(TINY, sos=320)
    with pytest.raises(ValueError, match="needs ids, word_ids and codes"):
        Prompt(codes=codes[0])
    with pytest.raises(ValueError, match="go around a speech"):
        Prompt(ids[0], prefix=ids[0])
    with pytest.raises(ValueError, match="1 words, but codes for 2"):
        Prompt(ids[1, :2], word_ids[1, :2], codes[1])
    with pytest.raises(ValueError, match="ids is empty"):
        Prompt(ids[0, :0])


def test_stored_lm_head_is_used_if_it_differs(latent: tuple) -> None:
    _, g = latent
    tensors = part(g, "weights.spoken_lm.")
    inner = "language_model.base_model.model."
    head = torch.randn_like(tensors[f"{inner}model.embed_tokens.weight"])
    model = from_public(
        {**tensors, f"{inner}lm_head.weight": head}, CONFIG, public_rvq(part(g, "weights.vq."))
    )
    assert not model.config.llm.tied
    hidden = torch.randn(2, 32)
    close(model.llm.logits(hidden), hidden @ head.T)
