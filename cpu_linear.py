"""Large matrix products on a CPU, by oneDNN instead of MKL, which holds back on AMD's processors.

    y = x W^T + b                  in fp32, without gradient; all else stays with torch
    model --quicken--> its large nn.Linear layers ask oneDNN

x (..., in), W (out, in), b (out,) -> y (..., out). The sums are the same up to their order. Models
are written with nn.Linear; who only runs them calls quicken once. The demo times both.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST = 2**18  # weights of fewer numbers gain nothing
HERE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
Model = TypeVar("Model", bound=nn.Module)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As F.linear."""
    large = HERE and weight.numel() >= SMALLEST and x.numel() > 0
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if large and plain and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class QuickLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)"""
        return linear(x, self.weight, self.bias)


def quicken(model: Model) -> Model:
    """The model itself: same weights, same names; on a GPU or in training nothing changes."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = QuickLinear
    return model


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
