"""LoRA by hand: learn a low-rank correction next to each frozen linear layer.

    y = W x + (alpha / r) B A dropout(x)      W (out, in) frozen, A (r, in) random, B (out, r) zero

    x (..., in) -+-- W, any precision -------------------------+--> y (..., out), precision of W x
                 '-- fp32 -- dropout -- A (..., r) -- B -- * --'

B = 0 starts the adapted model exactly at the pretrained one. `merge` folds the correction into a
copy of W, for fast inference; W itself never changes, so `unmerge` and state_dict() are exact.
[Hu et al. 2021, arXiv:2106.09685; TASTE: rank 64, alpha 128, dropout 0.05 on all linear layers]
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpu_linear import linear


class LoRALinear(nn.Module):
    merged: Tensor | None

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale, self.off = alpha / rank, False
        self.dropout = nn.Dropout(dropout)
        # fp32 also next to a bf16 base: small updates would be lost in bf16.
        device = base.weight.device
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)  # the init of nn.Linear
        self.register_buffer("merged", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in the dtype of the base layer's answer."""
        if self.off:
            return self.base(x)
        if self.merged is not None:
            return linear(x, self.merged, self.base.bias)
        low = self.scale * F.linear(self.dropout(x.to(self.A.dtype)), self.A)  # (..., r)
        return self.base(x).add_(F.linear(low, self.B))

    def folded(self) -> Tensor:
        """W + (alpha / r) B A (out, in), computed in fp32, then cast to the dtype of W."""
        correction = self.scale * self.B.float() @ self.A.float()
        return (self.base.weight.float() + correction).to(self.base.weight.dtype)

    def train(self, mode: bool = True) -> "LoRALinear":
        """A merged layer would pass no gradient to A and B, hence training unmerges."""
        if mode:
            self.merged = None
        return super().train(mode)


def add_lora(
    model: nn.Module, targets: Collection[str], rank: int, alpha: float, dropout: float = 0.0
) -> None:
    """Freeze `model`, then wrap every nn.Linear whose attribute name is in `targets`, in place.

    ValueError if a name is never met, or is that of anything else (for one: wrapped already)."""
    if rank < 1 or not 0 <= dropout < 1:
        raise ValueError(f"wanted rank >= 1 and 0 <= dropout < 1, got {rank=}, {dropout=}")
    targets = {targets} if isinstance(targets, str) else set(targets)
    sites = [(m, k, c) for m in model.modules() for k, c in m.named_children() if k in targets]
    if unseen := targets - {name for _, name, _ in sites}:
        names = sorted({name.rpartition(".")[2] for name, _ in linears(model)})
        raise ValueError(f"no module named {sorted(unseen)}; linear layers here are {names}")
    if odd := {f"{k} ({type(c).__name__})" for _, k, c in sites if not isinstance(c, nn.Linear)}:
        raise ValueError(f"LoRA wraps nn.Linear only, got {sorted(odd)}")
    model.requires_grad_(False)
    for parent, name, layer in sites:
        if isinstance(layer, nn.Linear):
            setattr(parent, name, LoRALinear(layer, rank, alpha, dropout).train(layer.training))


def linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """All plain linear layers, with their dotted names."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]


def lora_layers(model: nn.Module) -> list[LoRALinear]:
    """All adapted layers; ValueError if there is none."""
    if not (layers := [m for m in model.modules() if isinstance(m, LoRALinear)]):
        raise ValueError(f"{type(model).__name__} has no LoRA layer: call add_lora first")
    return layers


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every adapted layer, for the optimizer."""
    return [p for layer in lora_layers(model) for p in (layer.A, layer.B)]


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Run every adapted layer as one matrix product from now on, in eval mode only.

    Costs one more copy of the adapted weights. After loading other weights, merge again."""
    for layer in lora_layers(model):
        layer.eval()
        layer.merged = layer.folded()


def unmerge(model: nn.Module) -> None:
    """Undo `merge`, to the bit."""
    for layer in lora_layers(model):
        layer.merged = None


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """In here every adapted layer is the pretrained one, merged or not."""
    layers = lora_layers(model)
    for layer in layers:
        layer.off = True
    try:
        yield
    finally:
        for layer in layers:
            layer.off = False


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Put plain nn.Linear layers, W + (alpha / r) B A, in the places of the adapted ones: final."""
    for parent in [*model.modules()]:
        for name, layer in parent.named_children():
            if isinstance(layer, LoRALinear):
                layer.base.weight.copy_(layer.folded())
                setattr(parent, name, layer.base)


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes, {our name: A or B}: all that a checkpoint needs."""
    layers = {name for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    state = model.state_dict()
    return {f"{name}.{part}": state[f"{name}.{part}"] for name in layers for part in "AB"}


@torch.no_grad()
def load_lora(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Fill all A and B from `tensors` (our names), or raise ValueError and leave them alone."""
    ours = lora_state(model)
    problems = [f"{k}: missing" for k in ours.keys() - tensors.keys()]
    problems += [f"{k}: no such place" for k in tensors.keys() - ours.keys()]
    for k in ours.keys() & tensors.keys():
        if ours[k].shape != tensors[k].shape:
            problems.append(f"{k}: {[*tensors[k].shape]} in the file, {[*ours[k].shape]} here")
    if problems:
        raise ValueError(f"LoRA: {len(problems)} problems\n  " + "\n  ".join(sorted(problems)))
    for k in ours:
        ours[k].copy_(tensors[k])
    if ours:
        unmerge(model)


# Names of peft, of a whole model or of an adapter alone, -> those of the plain public model, where
# an adapted layer `x.weight` has become `x.base.weight`, `x.A` and `x.B`.
NAMES = {
    r"(?:base_model\.model\.)?(.+)\.base_layer\.(weight|bias)": r"\1.base.\2",
    r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight": r"\1.\2",
    r"(?:base_model\.model\.)?((?:(?!\.base_layer\.|\.lora_).)+)": r"\1",
}


if __name__ == "__main__":
    model = nn.Sequential(nn.Linear(128, 352), nn.SiLU(), nn.Linear(352, 128))
    add_lora(model, {"0", "2"}, rank=8, alpha=16, dropout=0.05)
    x = torch.randn(2, 5, 128)
    print(f"x {(*x.shape,)} -> {(*model(x).shape,)}")
    total = sum(p.numel() for p in model.parameters())
    print(f"{total} parameters, {sum(p.numel() for p in lora_parameters(model))} of them learn")
