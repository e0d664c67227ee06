"""fsq.py against the equations in float64 numpy, and against vector-quantize-pytorch."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fsq import FSQ, PAD, TINY, FSQConfig

CASES = [FSQConfig(16, 6, 8), FSQConfig(10, 3, 5, 1.5, 0.7), FSQConfig(8, 4, 2, learn_tau=False)]
KEEP = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])


def build(config: FSQConfig, seed: int = 0) -> tuple[FSQ, Tensor]:
    """A module away from its symmetric start, and an input (2, 7, D)."""
    torch.manual_seed(seed)
    fsq = FSQ(config)
    torch.nn.init.normal_(fsq.shift, std=0.5)
    torch.nn.init.normal_(fsq.scale, mean=config.scale_init)
    return fsq, torch.randn(2, 7, config.dim)


def paper(fsq: FSQ, x: Tensor, keep: Tensor) -> tuple[np.ndarray, np.ndarray, float]:
    """Section 4.2 and 4.3 word for word in float64 -> embedding, codes, loss."""
    p = {k: v.double().numpy() for k, v in fsq.state_dict().items()}
    X, m, L = x.double().numpy(), keep.numpy(), fsq.config.levels
    u = X @ p["encoder.weight"].T + p["encoder.bias"]
    u_tilde = u * p["scale"] + p["shift"]
    u_bar = np.tanh(u_tilde / np.exp(p["log_tau"]))
    i = np.clip(np.round((u_bar + 1) / 2 * (L - 1)), 0, L - 1)
    grid = np.array([-1 + 2 * k / (L - 1) for k in range(L)])
    y = grid[i.astype(int)] @ p["decoder.weight"].T + p["decoder.bias"]
    loss = (((X - y) * m[..., None]) ** 2).sum() / m.sum() / X.shape[-1]
    return y, i, loss


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("config", CASES, ids=str)
def test_is_the_papers_equations(config: FSQConfig, seed: int) -> None:
    fsq, x = build(config, seed)
    ours = fsq(x, KEEP)
    embedding, codes, loss = paper(fsq, x, KEEP)
    assert np.array_equal(ours.codes[KEEP].numpy(), codes[KEEP.numpy()])
    y = torch.from_numpy(embedding).float()
    torch.testing.assert_close(ours.embedding[KEEP], y[KEEP], rtol=1e-5, atol=1e-6)
    assert ours.loss.item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("levels", [2, 5, 8])
def test_rounds_and_differentiates_like_the_library(levels: int) -> None:
    lib = pytest.importorskip("vector_quantize_pytorch")
    library = lib.FSQ([levels] * 6, preserve_symmetry=True)  # its grid of L levels from -1 to 1
    fsq = FSQ(FSQConfig(6, 6, levels))
    torch.nn.init.eye_(fsq.encoder.weight), torch.nn.init.zeros_(fsq.encoder.bias)
    torch.nn.init.eye_(fsq.decoder.weight), torch.nn.init.zeros_(fsq.decoder.bias)
    ours_x = torch.randn(3, 50, 6, generator=torch.Generator().manual_seed(levels)) * 2
    their_x = ours_x.clone().requires_grad_()
    ours, theirs = fsq(ours_x.requires_grad_()).embedding, library.quantize(their_x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.autograd.backward([ours.square().sum(), theirs.square().sum()])
    torch.testing.assert_close(ours_x.grad, their_x.grad, rtol=1e-5, atol=1e-6)


def test_gradient_is_that_of_the_squashed_values() -> None:
    fsq, x = build(CASES[0])
    fsq.decoder.requires_grad_(False)
    (fsq(x).embedding * x).sum().backward()
    straight = torch.autograd.grad((fsq.decoder(fsq.squash(x)) * x).sum(), [fsq.scale, fsq.log_tau])
    torch.testing.assert_close([fsq.scale.grad, fsq.log_tau.grad], list(straight))


@pytest.mark.parametrize("config", CASES, ids=str)
def test_every_code_survives_decode(config: FSQConfig) -> None:
    fsq, x = build(config)
    out = fsq(x, KEEP)
    assert torch.equal(fsq.decode(out.codes), out.embedding)
    assert torch.equal(fsq.encode(x, KEEP), out.codes)
    every = torch.arange(config.levels)[:, None].expand(-1, config.d)
    assert torch.equal(fsq.round(fsq.values(every)), every)


def test_padding_neither_leaks_nor_learns() -> None:
    fsq, x = build(CASES[0])
    x[~KEEP] = float("nan")
    x.requires_grad_()
    batch = fsq(x, KEEP)
    assert (batch.codes[~KEEP] == PAD).all()
    assert torch.equal(batch.embedding[1, 3], fsq.decoder.bias)  # documented: q = 0
    (batch.embedding[KEEP].sum() + batch.loss).backward()
    assert x.grad is not None
    assert (x.grad[~KEEP] == 0).all()
    (padding,) = torch.autograd.grad(fsq(x, KEEP).embedding[~KEEP].sum(), fsq.encoder.bias)
    assert (padding == 0).all()
    alone = [fsq(x[:1]), fsq(x[1:, :3])]
    assert torch.equal(batch.codes[0], alone[0].codes[0])
    assert torch.equal(batch.codes[1, :3], alone[1].codes[0])
    torch.testing.assert_close(batch.loss, (7 * alone[0].loss + 3 * alone[1].loss) / 10)


def test_autocast_changes_nothing() -> None:
    fsq, x = build(FSQConfig())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, decoded = fsq(x), fsq.decode(fsq.encode(x))
    assert torch.equal(inside.codes, fsq.encode(x))
    assert torch.equal(inside.embedding, decoded)
    assert inside.embedding.dtype == torch.float32


def test_gradient_reaches_every_parameter_and_tau_can_be_fixed() -> None:
    fsq, x = build(CASES[0])
    fsq(x, KEEP).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fsq.parameters())
    fixed = FSQ(CASES[2])
    assert "log_tau" not in dict(fixed.named_parameters())
    assert fixed.state_dict().keys() == fsq.state_dict().keys()


def test_the_start_uses_all_levels_and_the_rates_are_right() -> None:
    torch.manual_seed(0)
    fsq, x = FSQ(TINY), torch.randn(20, 50, TINY.dim)
    fsq.start(x)
    used = torch.bincount(fsq.encode(x).flatten(), minlength=8)
    assert (used / used.sum() > 0.04).all()
    assert (fsq.n_codebooks, fsq.n_codes, fsq.bits_per_token) == (12, 8, 36.0)
    assert FSQ(FSQConfig()).bits_per_token == 192.0


def test_everything_padded_is_loss_zero() -> None:
    fsq, x = build(CASES[0])
    assert fsq(x, torch.zeros(2, 7, dtype=torch.bool)).loss.item() == 0.0


def test_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="at least 2 levels, got levels=1"):
        FSQConfig(levels=1)
    with pytest.raises(ValueError, match="tau_init must be positive, got 0"):
        FSQConfig(tau_init=0.0)
    fsq, x = build(CASES[0])
    with pytest.raises(ValueError, match=r"keep must be bool \(2, 7\), got torch.int64 \(2, 7\)"):
        fsq(x, KEEP.long())
    with pytest.raises(ValueError, match=r"-1 .. 8, wanted 0 .. 7"):
        fsq.decode(torch.tensor([[-1, 0, 1, 2, 3, 8]]))
    with pytest.raises(ValueError, match="last axis must be d=6"):
        fsq.decode(torch.zeros(1, 2, 5, dtype=torch.long))


def test_start_fills_the_levels_of_what_it_sees() -> None:
    torch.manual_seed(0)
    fsq = FSQ(FSQConfig(16, 6, 8, tau_init=0.5))
    x = 30 * torch.randn(4, 500, 16) + 30 * torch.randn(16)  # saturates tanh: two levels of eight
    keep = torch.rand(4, 500) < 0.7
    x[~keep] = torch.nan

    def shares() -> Tensor:
        codes = fsq.encode(x, keep)[keep]  # (n, d)
        return torch.stack([c.bincount(minlength=8) for c in codes.T]) / len(codes)

    assert shares()[:, [0, 7]].sum(1).min() > 0.8
    fsq.start(x, keep)
    assert shares().min() > 0.05
    assert shares().max() < 0.25
    assert fsq.squash(x[keep]).mean(0).abs().max() < 0.1
