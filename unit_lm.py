"""The pure unit LM: speech goes on as S3 units, with no text anywhere.

    x = EOS u_1 .. u_U,   targets u_1 .. u_U EOS        mean cross-entropy, a Llama over units
    prompt (U,) --generate, KV cache--> the units that follow, to EOS

    units (B, U) --pad EOS--> (B, 1 + U) --llm--> hidden (B, 1 + U, C) --> logits (B, 1 + U, K + 1)

K units and EOS = K, which also stands in front. Units are not merged: their number is the duration.
[GSLM: Lakhotia et al. 2021, arXiv:2102.01192; TWIST: arXiv:2305.13009; TASTE, 4.2: the S3 LM]
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llm
from llm import Llama, LlamaConfig, pick
from weights import as_config, load_model, read_config

IGNORE = -1  # unit of padding, and target of a position that predicts nothing
TINY = replace(llm.TINY, vocab=1025)


class UnitLMOutput(NamedTuple):
    loss: Tensor  # cross-entropy in nats, mean over units and EOS
    accuracy: Tensor  # share of them that is the most likely one


class UnitLM(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        """config.vocab: units and one more, EOS."""
        super().__init__()
        self.config, self.eos = config, config.vocab - 1
        self.llm = Llama(config)

    def forward(self, units: Tensor) -> UnitLMOutput:
        """units (B, U) int64, IGNORE behind each"""
        inputs = F.pad(units, (1, 0), value=self.eos).clamp(min=0)  # (B, 1 + U)
        ends = (units >= 0).sum(1, True)  # (B, 1)
        target = F.pad(units, (0, 1), value=IGNORE).scatter(1, ends, self.eos)  # (B, 1 + U)
        logits = self.llm.logits(self.llm(inputs)).float()  # causal: padding behind is not seen
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE)
        return UnitLMOutput(loss, (logits.argmax(-1) == target)[target != IGNORE].float().mean())

    @torch.inference_mode()
    def generate(
        self,
        prompt: Tensor,
        max_new: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        rng: torch.Generator | None = None,
    ) -> tuple[Tensor, bool]:
        """prompt (U,) int64, empty to begin freely -> the units that follow (U',), and whether the
        model came to an end before max_new of them."""
        row = F.pad(prompt.to(self.llm.embed.weight.device), (1, 0), value=self.eos)[None]  # (1, N)
        caches, new = self.llm.new_caches(row.shape[1] + max_new), list[Tensor]()
        while len(new) < max_new:
            hidden = self.llm(row, caches=caches)[:, -1]  # (1, C)
            row = pick(self.llm.logits(hidden), temperature, top_p, rng)[None]  # (1, 1)
            if int(row) == self.eos:
                break
            new.append(row[0])
        return torch.cat([prompt[:0].to(row.device), *new]), len(new) < max_new


def load_unit_lm(folder: Path) -> UnitLM:
    """A folder that train_unit_lm.py wrote, in eval mode."""
    config = as_config(LlamaConfig, read_config(folder, "unit_lm"), str(folder))
    return load_model(UnitLM(config), folder)


if __name__ == "__main__":
    model, units = UnitLM(TINY).eval(), torch.randint(1024, (2, 9))
    print(f"units {(*units.shape,)} -> {model(units).loss:.2f} nats, ln {TINY.vocab} = 6.93")
    new, ended = model.generate(units[0], max_new=8)
    print(f"goes on with {new.tolist()}, ended: {ended}")
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
