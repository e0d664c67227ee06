"""rvq.py against the golden files of the public quantizer and against vector-quantize-pytorch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor

from rvq import NAMES, PAD, RVQ, SKIP, TINY, RVQConfig, gather, kmeans
from weights import load_strict, rename

GOLDEN = Path(__file__).parent / "golden" / "taste"
SMALL = RVQConfig(dim=32, codebook_dim=16, codebook_size=24, kmeans_iters=10)
KEEP = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
DROP_AFTER = {0: 3, 1: 1, 2: 0, 3: 1, 4: 1, 5: 2}  # rvq_train.json: layers above are left out


def public(**changes: object) -> tuple[RVQ, dict[str, Tensor]]:
    """The quantizer of the golden files, in eval mode, and the tensors of rvq_eval."""
    file = load_file(GOLDEN / "rvq_eval.safetensors")
    weights = {k.removeprefix("weights."): v for k, v in file.items() if k.startswith("weights.")}
    rvq = RVQ(RVQConfig(**{**vars(SMALL), **changes}))
    load_strict(rvq, rename(weights, NAMES, SKIP))
    return rvq.eval(), file


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def test_reads_and_writes_codes_like_the_public_one() -> None:
    rvq, g = public()
    out = rvq(g["z"], g["mask"].bool())
    assert torch.equal(out.codes, g["indices"])
    assert torch.equal(rvq.encode(g["z"], g["mask"].bool()), g["indices"])
    close(out.embedding, g["quantized"])
    codes = g["indices"].clamp(min=0)  # what the public functions were given: code 0 at padding
    close(rvq.decode(codes), g["out_from_indices"])
    close(rvq.look_up(codes).movedim(2, 0), g["codes_from_indices"])
    close(rvq.decode(g["partial_indices"]), g["out_from_partial_indices"])


def test_helpers_of_the_language_model_are_the_public_ones() -> None:
    rvq, g = public()
    close(rvq.latent(g["partial_indices"]), g["code_from_partial_indices"])
    assert torch.equal(rvq.encode_latent(g["code_in"]), g["indices_from_code"])
    close(rvq.expected(g["logits_in"]), g["distributed_codes"])


@pytest.mark.parametrize("seed", range(6))
def test_training_step_is_the_public_one(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rvq, _ = public()
    g = load_file(GOLDEN / "rvq_train.safetensors")
    g |= {k.removeprefix(f"seed{seed}."): v for k, v in g.items() if k.startswith(f"seed{seed}.")}
    keep, z = g["mask"].bool(), g["z"].requires_grad_()
    monkeypatch.setattr(RVQ, "draw_depth", lambda *_: DROP_AFTER[seed] + 1)
    out = rvq.train()(z, keep)
    assert torch.equal(out.codes, g["indices"])
    close(out.loss, g["commit_losses"].sum())
    if seed > 1:
        return
    (out.embedding[keep].square().mean() + out.loss).backward()
    close(out.embedding, g["quantized"])
    assert z.grad is not None
    assert rvq.project_in.weight.grad is not None
    close(z.grad, g["grad_z"])
    close(rvq.project_in.weight.grad, g["grad_project_in_weight"])
    for i, book in enumerate(rvq.layers):
        close(book.count, g[f"after.layers.{i}.cluster_size"])
        close(book.total, g[f"after.layers.{i}.embed_avg"])
        close(book.code, g[f"after.layers.{i}.embed"])


def test_without_dropout_all_codebooks_are_used() -> None:
    rvq, _ = public(quantize_dropout=False)
    g = load_file(GOLDEN / "rvq_train.safetensors")
    out = rvq.train()(g["z"], g["mask"].bool())
    assert torch.equal(out.codes, g["nodrop.indices"])
    close(out.embedding, g["nodrop.quantized"])
    close(out.loss, g["nodrop.commit_losses"].sum())


def test_kmeans_is_the_public_one() -> None:
    g = load_file(GOLDEN / "rvq_train.safetensors")
    r = g["kmeans.samples"][0]
    means, count = kmeans(r, r[:24], 10)
    close(means, g["kmeans.means"][0])
    assert torch.equal(count.long(), g["kmeans.bins"][0])


@pytest.mark.parametrize(("seed", "Q", "K"), [(0, 2, 7), (1, 5, 40)])
def test_follows_the_library_for_many_steps(seed: int, Q: int, K: int) -> None:
    lib = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(seed)
    theirs = lib.ResidualVQ(
        dim=12, codebook_dim=6, codebook_size=K, num_quantizers=Q, decay=0.9, kmeans_init=False
    )
    ours = RVQ(RVQConfig(12, 6, K, Q, decay=0.9, kmeans_iters=0, quantize_dropout=False))
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        a.code.copy_(b._codebook.embed), a.total.copy_(b._codebook.embed_avg)
        a.count.copy_(b._codebook.cluster_size)
    ours.project_in.load_state_dict(theirs.project_in.state_dict())
    ours.project_out.load_state_dict(theirs.project_out.state_dict())
    for _ in range(20):
        x, keep = torch.randn(3, 11, 12), torch.arange(11) < torch.tensor([[11], [4], [1]])
        out = ours(x, keep)
        y, codes, loss = theirs(x, mask=keep)
        assert torch.equal(out.codes, codes)
        torch.testing.assert_close(out.embedding[keep], y[keep], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.loss, loss.sum(), rtol=1e-4, atol=1e-6)


def test_the_first_step_starts_the_codebooks_from_the_data() -> None:
    torch.manual_seed(0)
    rvq, x = RVQ(TINY), torch.randn(20, 30, 128)
    rvq.eval()
    far = rvq(x).loss
    for _ in range(40):
        rvq.train()(x)
    assert all(book.ready.item() for book in rvq.layers)
    assert rvq.eval()(x).loss < 0.6 * far
    assert len(rvq.encode(x)[..., 0].unique()) > 200


def test_kmeans_leaves_an_unused_mean_and_starts_the_averages() -> None:
    torch.manual_seed(0)
    r, start = torch.randn(50, 4), torch.cat([torch.randn(3, 4), torch.full((1, 4), 99.0)])
    means, count = kmeans(r, start, 5)
    assert torch.equal(means[3], start[3])
    assert count[3] == 0
    book = RVQ(RVQConfig(8, 4, 6, 1, kmeans_iters=5)).layers[0]
    book.start(r)
    assert book.count.sum() == 50
    torch.testing.assert_close(book.total, book.code * book.count[..., None])
    code = book.code.clone()
    book.update(r, book.nearest(r))
    torch.testing.assert_close(book.code, code, rtol=0, atol=0.05)  # it goes on from there


def test_one_step_follows_from_the_seed() -> None:
    def step() -> dict[str, Tensor]:
        torch.manual_seed(3)
        rvq = RVQ(SMALL).train()
        rvq(torch.randn(4, 20, 32))
        return rvq.state_dict()

    a, b = step(), step()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_dropout_draws_every_depth() -> None:
    rvq = RVQ(SMALL)
    assert {rvq.draw_depth(torch.device("cpu")) for _ in range(100)} == {1, 2, 3, 4}


def test_dead_codes_restart() -> None:
    torch.manual_seed(0)
    rvq = RVQ(RVQConfig(8, 4, 16, 1, kmeans_iters=0, dead_code_threshold=0.5)).train()
    rvq.layers[0].code[0, 5:] = rvq.layers[0].total[0, 5:] = 1e3  # nobody is near
    for _ in range(80):
        rvq(torch.randn(4, 30, 8))
    assert len(rvq.encode(torch.randn(4, 100, 8)).unique()) > 12


@pytest.mark.parametrize("training", [False, True])
def test_padding_neither_leaks_nor_learns(training: bool) -> None:
    rvq, _ = public(quantize_dropout=False)
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    nan = x.masked_fill(~KEEP[..., None], float("nan")).requires_grad_()
    state = {k: v.clone() for k, v in rvq.state_dict().items()}
    out = rvq.train(training)(nan, KEEP)
    (out.embedding[KEEP].sum() + out.loss).backward()
    assert nan.grad is not None
    assert (nan.grad[~KEEP] == 0).all()
    assert (out.codes[~KEEP] == PAD).all()
    assert torch.equal(out.embedding[1, 3], rvq.project_out.bias)
    rvq.load_state_dict(state)
    for row, n in ((0, 7), (1, 3)):
        alone = rvq.eval()(x[row : row + 1, :n])
        assert torch.equal(alone.codes[0], out.codes[row, :n])
        torch.testing.assert_close(alone.embedding[0], out.embedding[row, :n])


def test_decode_is_forward_also_under_autocast() -> None:
    torch.manual_seed(0)
    rvq, x = RVQ(RVQConfig()).eval(), torch.randn(2, 7, 1280)
    plain = rvq(x, KEEP)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, decoded = rvq(x, KEEP), rvq.decode(rvq.encode(x, KEEP))
    assert torch.equal(inside.codes, plain.codes)
    assert torch.equal(rvq.encode_latent(rvq.project_in(x))[KEEP], plain.codes[KEEP])
    assert torch.equal(decoded, plain.embedding)
    assert torch.equal(inside.embedding, plain.embedding)
    assert (rvq.n_codebooks, rvq.n_codes, rvq.bits_per_token) == (4, 512, 36.0)


def test_gradient_reaches_every_parameter() -> None:
    rvq, _ = public()
    out = rvq.train()(torch.randn(2, 7, 32), KEEP)
    (out.embedding.square().mean() + out.loss).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in rvq.parameters())


def test_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="quantizers must be at least 1, got 0"):
        RVQConfig(quantizers=0)
    rvq, _ = public()
    with pytest.raises(ValueError, match=r"-1 .. 24, wanted 0 .. 23"):
        rvq.decode(torch.tensor([[-1, 0, 1, 24]]))
    with pytest.raises(ValueError, match="last axis must be Q=4"):
        rvq.latent(torch.zeros(1, 2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"keep must be bool \(2, 7\), got torch.bool \(2, 6\)"):
        rvq(torch.randn(2, 7, 32), KEEP[:, :6])


def train_a_rank(rank: int, file: str, config: RVQConfig) -> None:
    """Two steps on this process's share of the batch; rows of unequal number are real."""
    torch.set_num_threads(1)
    if rank >= 0:
        dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    rvq = RVQ(config).train()
    x = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(1))
    keep = torch.arange(40) < torch.tensor([[40], [17]])
    torch.manual_seed(100 + max(rank, 0))  # as seed_step does: every rank draws differently
    mine = slice(None) if rank < 0 else slice(rank, rank + 1)
    depths = [(rvq(x[mine], keep[mine]).codes[0, 0] != PAD).sum() for _ in range(2)]
    if rank >= 0:
        assert len(gather(x[rank][keep[rank]])) == 57
        dist.barrier()
        dist.destroy_process_group()
    torch.save([depths, rvq.state_dict()], f"{file}.{rank}")


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path) -> None:
    file, config = str(tmp_path / "group"), RVQConfig(8, 4, 9, 3, kmeans_iters=5)
    mp.spawn(train_a_rank, (file, config), nprocs=2)
    train_a_rank(-1, file, config)
    one, first, second = (torch.load(f"{file}.{r}", weights_only=True) for r in (-1, 0, 1))
    assert first[0] == second[0] == one[0]
    for name, tensor in one[1].items():
        assert torch.equal(first[1][name], second[1][name]), name
        torch.testing.assert_close(first[1][name], tensor, rtol=1e-5, atol=1e-6)
