"""lora.py against peft: same answers, same gradients, same checkpoint names."""

import pytest
import torch
from torch import Tensor, nn

from lora import (
    NAMES,
    LoRALinear,
    add_lora,
    fold,
    load_lora,
    lora_layers,
    lora_parameters,
    lora_state,
    merge,
    unmerge,
)
from weights import load_strict, rename


class Net(nn.Module):
    """Two targets, one of them twice, one with bias; `out` stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(6, 6)}) for _ in range(2))
        self.up = nn.Linear(6, 9, bias=False)
        self.out = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block["q"](x))  # type: ignore[index]
        return self.out(torch.tanh(self.up(x)))


def build(seed: int = 0, dropout: float = 0.0) -> tuple[Net, Tensor]:
    """An adapted model whose B is no longer 0, and an input."""
    torch.manual_seed(seed)
    net = Net()
    add_lora(net, ("q", "up"), rank=3, alpha=6, dropout=dropout)
    for layer in lora_layers(net):
        nn.init.normal_(layer.B)
    return net, torch.randn(5, 6)


@pytest.mark.parametrize("seed", range(3))
def test_is_peft(seed: int) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q", "up"], init_lora_weights=False)
    theirs, ours = peft.get_peft_model(Net(), config), Net()
    add_lora(ours, ("q", "up"), rank=3, alpha=7)
    load_strict(ours, rename(theirs.state_dict(), NAMES))
    x = torch.randn(5, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).square().sum().backward(), theirs(x).square().sum().backward()
    trained = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    grads = rename(trained, NAMES)
    assert grads.keys() == lora_state(ours).keys()
    for name, p in ours.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, grads[name])
    adapter = rename(peft.get_peft_model_state_dict(theirs), NAMES)  # names without ".default"
    load_lora(ours, adapter)
    torch.testing.assert_close(ours(x), theirs(x))


def test_starts_at_the_pretrained_model_and_trains_only_a_and_b() -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 6)
    before = net(x)
    add_lora(net, ["q", "up"], rank=3, alpha=6, dropout=0.5)
    assert torch.equal(net(x), before)
    assert {id(p) for p in net.parameters() if p.requires_grad} == {*map(id, lora_parameters(net))}
    net(x).sum().backward()
    assert all(p.grad is not None for p in lora_parameters(net))
    assert lora_layers(net)[0].A.std() > 0.1
    assert net.out.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_changes_no_answer_and_unmerge_undoes_it_to_the_bit(dtype: torch.dtype) -> None:
    net, x = build()
    for layer in lora_layers(net):
        layer.base.to(dtype)
    net.out.to(dtype)
    net.eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        before = net(x)
        merge(net)
        merged = net(x)
        unmerge(net)
        after = net(x)
    tolerance = 1e-6 if dtype == torch.float32 else 3e-2
    assert (merged - before).abs().max() <= tolerance * before.abs().max()
    assert torch.equal(after, before)
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())


def test_merged_weights_are_not_saved_and_do_not_survive_training() -> None:
    net, x = build()
    names = net.state_dict().keys()
    merge(net)
    assert net.state_dict().keys() == names
    net.train()
    net(x).sum().backward()
    assert all(p.grad is not None for p in lora_parameters(net))


def test_fold_gives_back_the_plain_model() -> None:
    net, x = build()
    before = net.eval()(x)
    fold(net)
    assert net.state_dict().keys() == Net().state_dict().keys()
    torch.testing.assert_close(net(x), before)


def test_bf16_base_computes_its_correction_in_fp32() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 64).bfloat16(), rank=8, alpha=16)
    nn.init.normal_(layer.B)
    x = torch.randn(3, 64).bfloat16()
    exact = x.double() @ layer.A.double().T @ layer.B.double().T * 2
    wanted = (layer.base(x).double() + exact).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    assert layer.A.dtype == layer.B.dtype == torch.float32
    assert (layer(x) != wanted).float().mean() < 0.02  # but for ties in the last rounding


def test_dropout_acts_on_the_correction_only_and_in_training_only() -> None:
    net, x = build(dropout=0.5)
    layer = lora_layers(net)[0]
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    torch.manual_seed(1)
    torch.testing.assert_close(layer(x), layer.base(x) + dropped @ layer.A.T @ layer.B.T * 2)
    assert torch.equal(net.eval()(x), net(x))


def test_only_the_adapter_needs_to_be_saved() -> None:
    a, x = build(0)
    b, _ = build(1)
    b.load_state_dict({**b.state_dict(), **{k: v for k, v in a.state_dict().items()}})
    for layer in lora_layers(b):
        nn.init.normal_(layer.A)
    merge(b)
    load_lora(b, lora_state(a))
    assert torch.equal(b(x), a(x))


def test_says_what_is_wrong() -> None:
    net, _ = build()
    with pytest.raises(ValueError, match=r"no module named \['qq'\]; linear layers here are"):
        add_lora(Net(), ("q", "qq"), rank=3, alpha=6)
    with pytest.raises(ValueError, match=r"nn.Linear only, got \['q \(LoRALinear\)'\]"):
        add_lora(net, ("q",), rank=3, alpha=6)
    with pytest.raises(ValueError, match="rank >= 1 and 0 <= dropout < 1, got rank=0"):
        add_lora(Net(), ("q",), rank=0, alpha=6)
    with pytest.raises(ValueError, match="Net has no LoRA layer: call add_lora first"):
        lora_parameters(Net())
    state = lora_state(net)
    state["up.C"] = state.pop("up.A")
    state["up.B"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"3 problems\n  up.A: missing\n  up.B: \[1\].*\n  up.C"):
        load_lora(net, state)
