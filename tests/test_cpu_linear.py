"""cpu_linear.py gives what F.linear gives, for every kind of input that a model has."""

import copy

import pytest
import torch
from torch import Tensor, nn

import cpu_linear
import lora
from cpu_linear import QuickLinear, linear, quicken

pytestmark = pytest.mark.skipif(not cpu_linear.HERE, reason="this torch has no oneDNN")
OP = "torch.ops.mkldnn._linear_pointwise"


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 512)
    return {
        "batch": x, "row": x[0, :1], "vector": x[0, 0], "nothing": x[:, :0],
        "a transposed one": torch.randn(512, 7).T, "every second": torch.randn(3, 10, 512)[:, ::2],
        "expanded": x[:1].expand(4, -1, -1), "a part of the width": torch.randn(3, 600)[:, 50:562],
    }  # fmt: skip


@pytest.mark.parametrize("name", inputs())
@pytest.mark.parametrize("bias", [True, False])
def test_gives_the_same(name: str, bias: bool) -> None:
    x, layer = inputs()[name], nn.Linear(512, 600, bias)
    with torch.no_grad():
        found = linear(x, layer.weight, layer.bias)
    exact = nn.functional.linear(x.double(), layer.weight.double(),
                                 layer.bias.double() if bias else None)  # fmt: skip
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert found.dtype == torch.float32


class Spy:
    """Counts the calls that reach oneDNN."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.op = 0, torch.ops.mkldnn._linear_pointwise
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", self)

    def __call__(self, *args: object) -> Tensor:
        self.calls += 1
        return self.op(*args)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", ["nothing", "the input", "the weights"])
@pytest.mark.parametrize("name", [*inputs()])
def test_gives_the_same_gradients(name: str, frozen: str, bias: bool) -> None:
    x, layer = inputs()[name], nn.Linear(512, 600, bias)
    x.requires_grad_(frozen != "the input")
    layer.requires_grad_(frozen != "the weights")
    given = [x, *layer.parameters()]
    exact = [p.detach().double().requires_grad_(p.requires_grad) for p in given]
    y, y64 = linear(*given), nn.functional.linear(*exact)
    dy = torch.randn(600, *y.shape[:-1]).movedim(0, -1)  # in another order in memory
    found, wanted = (
        torch.autograd.grad(out, [p for p in ps if p.requires_grad], dy.to(out.dtype))
        for out, ps in ((y, given), (y64, exact))
    )
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)


def test_a_frozen_layer_keeps_no_input() -> None:
    layer, kept = nn.Linear(512, 512).requires_grad_(False), list[torch.Size]()

    def keep(x: Tensor) -> Tensor:
        kept.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        linear(torch.randn(3, 512, requires_grad=True), layer.weight)
    assert kept == [layer.weight.shape]


def test_only_large_ones_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    spy, large, small = Spy(monkeypatch), nn.Linear(512, 512), nn.Linear(512, 511)
    net, x = quicken(nn.Sequential(large, small)), torch.randn(2, 512)
    with torch.inference_mode():
        net(x)
        assert spy.calls == 1
        with torch.autocast("cpu", torch.bfloat16):
            assert net(x).dtype == torch.bfloat16
        copy.deepcopy(net).bfloat16()(x.bfloat16())
        net.double()(x.double())
    assert spy.calls == 1
    net.float()(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert spy.calls == 2  # the input has no gradient


def test_a_quick_model_is_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 512))
    state, spy = {k: v.clone() for k, v in net.state_dict().items()}, Spy(monkeypatch)
    assert quicken(net) is net
    other = copy.deepcopy(net)
    assert all(torch.equal(state[k], v) for k, v in other.state_dict().items())
    assert type(other[0]) is QuickLinear
    lora.add_lora(other, {"0", "2"}, 4, 8.0)
    with torch.no_grad():
        other(torch.randn(2, 512))
        assert spy.calls == 2  # the frozen bases; A and B are small
        lora.merge(other)
        other(torch.randn(2, 512))
        assert spy.calls == 4
