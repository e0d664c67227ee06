"""Large matrix products on a CPU, by oneDNN instead of MKL, which holds back on AMD's processors.

    y = x W^T + b,   dx = dy W     in fp32; dW = dy^T x gains nothing and, like all else, stays
    model --quicken--> its large nn.Linear layers ask oneDNN

x (..., in), W (out, in), b (out,) -> y (..., out). The sums are the same up to their order. Models
are written with nn.Linear; who runs or trains a large one calls quicken once. The demo times both.
"""

import math
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

SMALLEST = 2**18  # weights of fewer numbers gain nothing
HERE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
Model = TypeVar("Model", bound=nn.Module)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As F.linear, by oneDNN, without gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Product(torch.autograd.Function):
    """The same for rows x (M, in), with gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, weight), needed = grads, ctx.saved_tensors, ctx.needs_input_grad
        dx = product(dy, weight.T) if needed[0] else None
        return dx, dy.T @ x if needed[1] else None, dy.sum(0) if needed[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As F.linear."""
    large = HERE and weight.numel() >= SMALLEST and x.numel() > 0
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if not (large and plain) or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return product(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    return Product.apply(rows, weight, bias).view(*x.shape[:-1], -1)


class QuickLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)"""
        return linear(x, self.weight, self.bias)


def quicken(model: Model) -> Model:
    """The model itself: same weights, same names; on a GPU nothing changes."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = QuickLinear
    return model


def operations(x: Any, weight: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    """Of one product: shapes (..., in) and (out, in) -> multiplications and additions."""
    return 2 * math.prod(x) * weight[0]


def counter() -> FlopCounterMode:
    """PyTorch's counter of operations, that knows these products, too."""
    ours = {torch.ops.mkldnn._linear_pointwise: operations} if HERE else {}
    return FlopCounterMode(display=False, custom_mapping=ours)


if __name__ == "__main__":
    import time

    x, layers = torch.randn(1, 2048), [nn.Linear(2048, 8192) for _ in range(8)]
    with torch.inference_mode():
        for name, step in (("nn.Linear", lambda y: y), ("quicken", quicken)):
            steps = [step(layer) for layer in layers]
            start = time.perf_counter()
            for i in range(80):
                steps[i % 8](x)
            print(f"{name}: {1000 * (time.perf_counter() - start) / 80:.2f} ms, x (1, 2048)")
