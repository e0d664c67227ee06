"""Units to sound: the flow makes a log-mel of the units and a voice, HiFT makes the waveform.

    units (U,), voice (X,) --Flow, Euler steps--> mel (80, F) --HiFT--> wav (256 F,) at 22.05 kHz

`griffin_lim` is the plain alternative without a network that the copy-synthesis test compares with.
[CosyVoice: Du et al. 2024, arXiv:2407.05407, sec. 2.3; the stages are flow.py and hift.py]
"""

from pathlib import Path

import torch
import torchaudio
from torch import Tensor, nn

import audio
from flow import Flow, FlowConfig
from hift import HiFT, HiFTConfig
from weights import as_config, load_model, read_config


class Vocoder(nn.Module):
    def __init__(self, flow: Flow, hift: HiFT) -> None:
        super().__init__()
        self.flow, self.hift = flow, hift

    @torch.inference_mode()
    def forward(self, units: Tensor, voice: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """units (U,) int64, voice (X,) -> wav (256 F,) float32 at 22.05 kHz, F = flow.frames(U).

        rng draws the flow's noise; HiFT's phases come from the global generator.
        No units: ValueError."""
        if not len(units):
            raise ValueError("no units to speak: the unit decoder ended at once")
        lengths = torch.tensor([len(units)], device=units.device)
        mel, _ = self.flow.sample(units[None], lengths, voice[None], rng=rng)
        with torch.autocast(mel.device.type, enabled=False):  # phases are sums over all samples
            return self.hift(mel.float())[0]


def load_vocoder(bundle: Path) -> Vocoder:
    """bundle/flow and bundle/hift, folders of our own, in eval mode."""
    return Vocoder(load_flow(bundle), load_hift(bundle)).eval()


def load_flow(bundle: Path) -> Flow:
    """bundle/flow in eval mode."""
    config = as_config(FlowConfig, read_config(bundle / "flow"), str(bundle / "flow"))
    return load_model(Flow(config), bundle / "flow")


def load_hift(bundle: Path) -> HiFT:
    """bundle/hift in eval mode, weight norm folded."""
    config = as_config(HiFTConfig, read_config(bundle / "hift"), str(bundle / "hift"))
    return load_model(HiFT(config).fold(), bundle / "hift")


def griffin_lim(mel: Tensor, iterations: int = 32) -> Tensor:
    """mel (80, F) natural log at 22.05 kHz -> wav (256 F,): least-squares spectrum, then phases by
    [Griffin & Lim 1984], with the momentum of Perraudin 2013."""
    bank = audio.mel_filters(audio.VOCODER_RATE, audio.VOCODER_FFT, audio.VOCODER_MELS, 0.0, 8000.0)
    power = torch.linalg.lstsq(bank, mel.exp()).solution.clamp(min=0)  # (513, F) magnitudes
    window = torch.hann_window(audio.VOCODER_FFT)
    wav = torchaudio.functional.griffinlim(
        power, window, audio.VOCODER_FFT, audio.VOCODER_HOP, audio.VOCODER_FFT, power=1.0,
        n_iter=iterations, momentum=0.99, length=None, rand_init=False,
    )  # fmt: skip
    # (256 (F - 1),): its frames are centred on 256 f, those of vocoder_mel on 256 f + 128
    return nn.functional.pad(wav, (audio.VOCODER_HOP // 2, audio.VOCODER_HOP // 2))


if __name__ == "__main__":
    from flow import TINY as FLOW
    from hift import TINY as HIFT

    model = Vocoder(Flow(FLOW), HiFT(HIFT)).eval()
    wav = model(torch.randint(FLOW.units, (25,)), torch.randn(FLOW.speaker))
    print(f"units (25,) = 1 s -> wav {(*wav.shape,)}, parameters "
          f"{sum(p.numel() for p in model.parameters()):,}")  # fmt: skip
