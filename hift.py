"""HiFT: log-mel to waveform, a neural source-filter vocoder whose output is a short inverse STFT.

    source = tanh(w . [sin(2 pi h sum f0 / rate + phi_h) | noise])         h = 1..9 harmonics
    wav    = iSTFT(min(exp(a), 100), angle = sin(b)),   (a, b) = net(mel, STFT(source))

    mel (B, M, F) --F0Predictor--> f0 (B, F) --Source--> (B, 256 F) --STFT 16/4--> (B, 18, 64 F + 1)
     '--conv--> (B, C, F) --x8, + source, ResBlocks--> (B, C/2, 8 F) --x8, + source, ResBlocks-->
        (B, C/4, 64 F + 1) --conv--> (B, 18, 64 F + 1) --iSTFT 16/4--> wav (B, 256 F)

A sine at the right pitch comes in, so the network only shapes it. Training: a GAN after HiFi-GAN
(MPD + MRD) on top of mel distance; without the GAN, MR-STFT distance. There is no padding mask, in
the public model neither: convolutions see the neighbours, so run items one by one at inference.
[CosyVoice 300M, hift.pt; HiFTNet, Li et al. 2023, arXiv:2309.09493; HiFi-GAN, arXiv:2010.05646]
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from weights import load_strict, rename

MAX_MAGNITUDE = 100.0  # of one bin of the inverse STFT
MEL_CENTRE, MEL_SPREAD = -5.5, 2.0  # of natural log-mels of speech, for the start of training only
TPR_TAU = 0.04


@dataclass(frozen=True)
class HiFTConfig:
    """Defaults: hift.pt of CosyVoice-300M, 20.5 M parameters."""

    mels: int = 80
    channels: int = 512  # halved by each upsampling
    harmonics: int = 8  # above the fundamental
    rate: int = 22050  # Hz
    upsample: tuple[int, ...] = (8, 8)
    upsample_kernels: tuple[int, ...] = (16, 16)
    n_fft: int = 16
    hop: int = 4
    kernels: tuple[int, ...] = (3, 7, 11)
    dilations: tuple[int, ...] = (1, 3, 5)
    source_kernels: tuple[int, ...] = (7, 11)
    f0_channels: int = 512
    sine_amp: float = 0.1
    noise_std: float = 0.003  # beside a voiced sine
    voiced_hz: float = 10.0
    limit: float = 0.99  # of |wav|

    def __post_init__(self) -> None:
        stages = len(self.upsample)
        if not stages == len(self.upsample_kernels) == len(self.source_kernels):
            raise ValueError("upsample, upsample_kernels and source_kernels need the same length")
        if self.channels % 2**stages:
            raise ValueError(f"channels={self.channels} must be a multiple of {2**stages}")
        for k, s in zip(self.upsample_kernels, self.upsample, strict=True):
            if k < s or (k - s) % 2:
                raise ValueError(
                    f"upsample kernel {k} must exceed its stride {s} by an even number"
                )
        if any(k % 2 == 0 for k in (*self.kernels, *self.source_kernels)):
            raise ValueError("kernels and source_kernels must be odd")

    @property
    def samples(self) -> int:
        """Samples of one mel frame."""
        return math.prod(self.upsample) * self.hop


TINY = HiFTConfig(channels=64, f0_channels=64)


class F0Predictor(nn.Module):
    def __init__(self, mels: int, channels: int) -> None:
        super().__init__()
        widths = [mels] + [channels] * 5
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv1d(a, b, 3, padding=1))
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.out = nn.Linear(channels, 1)

    def forward(self, mel: Tensor) -> Tensor:
        """mel (B, M, F) -> f0 (B, F) in Hz, about 0 where unvoiced."""
        for conv in self.convs:
            mel = F.elu(conv(mel))  # (B, C, F)
        return self.out(mel.transpose(1, 2)).squeeze(-1).abs()  # (B, F)


class Source(nn.Module):
    def __init__(self, config: HiFTConfig) -> None:
        super().__init__()
        self.config = config
        self.mix = nn.Linear(config.harmonics + 1, 1)

    @torch.no_grad()
    def sines(self, f0: Tensor, phase: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """f0 (B, F) Hz -> (B, S, h): sines where voiced, noise where not. See forward."""
        c, h = self.config, self.config.harmonics + 1
        f0 = f0.float().repeat_interleave(c.samples, 1)[..., None]  # (B, S, 1)
        if phase is None:
            phase = math.pi * (2 * torch.rand(len(f0), h, device=f0.device) - 1)
            phase[:, 0] = 0
        if noise is None:
            noise = torch.randn(*f0.shape[:2], h, device=f0.device).transpose(1, 2)  # (B, h, S)
        steps = f0 * torch.arange(1, h + 1, device=f0.device) / c.rate  # (B, S, h) cycles a sample
        turns = (
            steps.cumsum(1) % 1
        )  # fraction after the sum, all in fp32, as the public model has it
        sines = c.sine_amp * torch.sin(2 * math.pi * turns + phase[:, None])
        voiced = (f0 > c.voiced_hz).float()  # (B, S, 1)
        loudness = voiced * c.noise_std + (1 - voiced) * c.sine_amp / 3
        return sines * voiced + loudness * noise.float().transpose(1, 2)  # (B, S, h)

    def forward(
        self, f0: Tensor, phase: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """f0 (B, F) Hz -> excitation (B, S), S = samples * F.

        phase (B, h) starts of the harmonics in radians, noise (B, h, S) standard normal, h =
        harmonics + 1; both are drawn from torch's global generator if not given."""
        with torch.autocast(f0.device.type, enabled=False):
            return torch.tanh(self.mix(self.sines(f0, phase, noise))).squeeze(-1)  # (B, S)


class Snake(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x + sin^2(alpha x) / alpha on (B, C, T): keeps periodic signals periodic."""
        alpha = self.alpha[:, None]
        return x + torch.sin(alpha * x) ** 2 / (alpha + 1e-9)


class ResBlock(nn.Module):
    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()

        def conv(d: int) -> nn.Module:
            pad = d * (kernel - 1) // 2
            return weight_norm(nn.Conv1d(channels, channels, kernel, dilation=d, padding=pad))

        self.snakes1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.convs1 = nn.ModuleList(conv(d) for d in dilations)
        self.snakes2 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.convs2 = nn.ModuleList(conv(1) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C, T)"""
        layers = zip(self.snakes1, self.convs1, self.snakes2, self.convs2, strict=True)
        for snake1, conv1, snake2, conv2 in layers:
            x = x + conv2(snake2(conv1(snake1(x))))
        return x


class HiFT(nn.Module):
    window: Tensor  # (n_fft,)

    def __init__(self, config: HiFTConfig) -> None:
        super().__init__()
        self.config = c = config
        bins = c.n_fft + 2  # real and imaginary rows
        self.f0 = F0Predictor(c.mels, c.f0_channels)
        self.source = Source(c)
        self.pre = weight_norm(nn.Conv1d(c.mels, c.channels, 7, padding=3))
        self.ups, self.downs = nn.ModuleList(), nn.ModuleList()
        self.source_blocks, self.blocks = nn.ModuleList(), nn.ModuleList()
        for i, (k, s) in enumerate(zip(c.upsample_kernels, c.upsample, strict=True)):
            width = c.channels // 2 ** (i + 1)
            up = nn.ConvTranspose1d(2 * width, width, k, s, padding=(k - s) // 2)
            self.ups.append(weight_norm(up))  # over dim 0, which is the input channel here
            down = math.prod(c.upsample[i + 1 :])  # from the rate of the STFT to that of this stage
            kernel, pad = (2 * down, down // 2) if down > 1 else (1, 0)
            self.downs.append(nn.Conv1d(bins, width, kernel, down, padding=pad))
            self.source_blocks.append(ResBlock(width, c.source_kernels[i], c.dilations))
            self.blocks.extend(ResBlock(width, k, c.dilations) for k in c.kernels)
        self.post = weight_norm(nn.Conv1d(width, bins, 7, padding=3))
        self.register_buffer("window", torch.hann_window(c.n_fft), persistent=False)
        init_for_training(self)

    def forward(
        self,
        mel: Tensor,
        f0: Tensor | None = None,
        phase: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """mel (B, M, F) natural log, f0 (B, F) Hz or None = predicted -> wav (B, samples * F).

        phase, noise: see Source. No gradient reaches f0: the predictor learns from its own loss."""
        return self.decode(mel, self.source(self.f0(mel) if f0 is None else f0, phase, noise))

    def decode(self, mel: Tensor, source: Tensor) -> Tensor:
        """mel (B, M, F), source (B, samples * F) -> wav (B, samples * F) within +-limit."""
        c = self.config
        if source.shape != (mel.shape[0], c.samples * mel.shape[2]):
            wanted = (mel.shape[0], c.samples * mel.shape[2])
            raise ValueError(
                f"source is {tuple(source.shape)}, mel {tuple(mel.shape)} needs {wanted}"
            )
        s = torch.stft(source.float(), c.n_fft, c.hop, window=self.window, return_complex=True)
        s = torch.cat([s.real, s.imag], 1)  # (B, 18, 64 F + 1)
        x = self.pre(mel)  # (B, C, F)
        n = len(c.kernels)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, 0.1))  # (B, C/2, 8 F)
            if i == len(self.ups) - 1:
                x = F.pad(x, (1, 0), mode="reflect")  # (B, C/4, 64 F + 1), as many as s has
            x = x + self.source_blocks[i](self.downs[i](s))
            x = torch.stack([block(x) for block in self.blocks[i * n : (i + 1) * n]]).mean(0)
        # Quirk: slope 0.01 here, 0.1 above [CosyVoice hifigan/generator.py: the default slips in]
        a, b = self.post(F.leaky_relu(x)).float().chunk(2, 1)  # (B, 9, 64 F + 1) each
        # Quirk: the angle is sin(b), within +-1 radian; overlapping frames make up for the rest
        spectrum = torch.polar(a.exp().clamp(max=MAX_MAGNITUDE), torch.sin(b))
        wav = torch.istft(spectrum, c.n_fft, c.hop, window=self.window)  # (B, 256 F)
        return wav.clamp(-c.limit, c.limit)

    def fold(self) -> "HiFT":
        """Replace g v / ||v|| by its value, in place: same output, faster, no longer for training."""
        for module in self.modules():
            if is_parametrized(module, "weight"):
                remove_parametrizations(module, "weight")
        return self


# ---- training -----------------------------------------------------------------------------------


@torch.no_grad()
def init_for_training(model: HiFT) -> None:
    """Start where the pitch of the source is heard in the output; torch's own start hides it.

    With torch's start the source enters 30 times weaker than the mel, and the upsampling kernels
    make tones at multiples of the frame rate instead, a local minimum that training stays in."""
    c = model.config
    model.pre.weight = model.pre.weight / MEL_SPREAD
    model.pre.bias -= model.pre.weight.sum((1, 2)) * MEL_CENTRE  # as if (mel - centre) / spread
    for up in model.ups:
        size, stride = up.kernel_size[0], up.stride[0]
        ramp = 1 - (torch.arange(size) + 0.5 - size / 2).abs() / stride  # linear interpolation
        inputs, outputs, _ = up.weight.shape
        mix = torch.randn(inputs, outputs) * inputs**-0.5
        up.weight = mix[..., None] * ramp.clamp(min=0) + 1e-3 * torch.randn(up.weight.shape)
    model.source.mix.weight.fill_(0.2 / c.sine_amp)  # peaks near 1, where tanh adds overtones
    model.source.mix.bias.zero_()
    for down in model.downs:
        down.weight.mul_(3.0)
    model.post.weight = model.post.weight * 0.5
    model.post.bias[: c.n_fft // 2 + 1] = -2.0
    model.post.bias[c.n_fft // 2 + 1 :] = 0.0
    model.f0.out.weight.mul_(100.0)  # Hz, not units
    model.f0.out.bias.fill_(100.0)


Judgement = list[tuple[Tensor, list[Tensor]]]  # of each discriminator: output (B, n), feature maps


@dataclass(frozen=True)
class JudgeConfig:
    """Sizes of the discriminators; defaults: those of CosyVoice, 41.1 M + 0.28 M parameters."""

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    period_channels: tuple[int, ...] = (32, 128, 512, 1024, 1024)
    stfts: tuple[tuple[int, int, int], ...] = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
    stft_channels: int = 32


TINY_JUDGES = JudgeConfig((2, 3, 5), (8, 16, 32, 64, 64), ((1024, 240, 600), (512, 120, 240)), 12)


class PeriodJudge(nn.Module):
    def __init__(self, period: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.period, widths = period, (1, *channels)
        strides = [3] * (len(channels) - 1) + [1]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(a, b, (5, 1), (s, 1), padding=(2, 0)))
            for a, b, s in zip(widths[:-1], widths[1:], strides, strict=True)
        )
        self.out = weight_norm(nn.Conv2d(channels[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, wav: Tensor) -> tuple[Tensor, list[Tensor]]:
        """wav (B, S), folded into rows of one period -> output (B, n), feature maps."""
        wav = F.pad(wav, (0, -wav.shape[1] % self.period), mode="reflect")
        x, maps = wav.unflatten(1, (-1, self.period))[:, None], []  # (B, 1, S/p, p)
        for conv in self.convs:
            maps.append(x := F.leaky_relu(conv(x), 0.1))
        maps.append(x := self.out(x))
        return x.flatten(1), maps


class SpectrumJudge(nn.Module):
    window: Tensor  # (win,)

    def __init__(self, n_fft: int, hop: int, win: int, channels: int) -> None:
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        shapes = [(1, 9, 1), (channels, 9, 2), (channels, 9, 2), (channels, 9, 2), (channels, 3, 1)]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(a, channels, (3, k), (1, s), padding=(1, k // 2)))
            for a, k, s in shapes
        )
        self.out = weight_norm(nn.Conv2d(channels, 1, 3, padding=1))
        self.register_buffer("window", torch.hann_window(win), persistent=False)

    def forward(self, wav: Tensor) -> tuple[Tensor, list[Tensor]]:
        """wav (B, S) -> output (B, n), feature maps."""
        x = magnitude(wav, self.n_fft, self.hop, self.window)
        x, maps = x.transpose(1, 2)[:, None], []  # (B, 1, frames, bins)
        for conv in self.convs:
            maps.append(x := F.leaky_relu(conv(x), 0.1))
        maps.append(x := self.out(x))
        return x.flatten(1), maps


class Judges(nn.Module):
    """All discriminators: by period (MPD), then by resolution (MRD)."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.by_period = nn.ModuleList(
            PeriodJudge(p, config.period_channels) for p in config.periods
        )
        self.by_stft = nn.ModuleList(SpectrumJudge(*s, config.stft_channels) for s in config.stfts)

    def forward(self, wav: Tensor) -> Judgement:
        """wav (B, S) -> what each discriminator says; near 1 = real, near 0 = generated."""
        return [judge(wav) for judge in (*self.by_period, *self.by_stft)]


def magnitude(wav: Tensor, n_fft: int, hop: int, window: Tensor) -> Tensor:
    """wav (B, S) -> linear magnitudes (B, n_fft // 2 + 1, frames), centred frames."""
    return torch.stft(
        wav.float(), n_fft, hop, len(window), window=window, return_complex=True
    ).abs()


def adversarial_loss(fake: Judgement) -> Tensor:
    """LSGAN for the generator: every output should be 1."""
    return torch.stack([((1 - out) ** 2).mean() for out, _ in fake]).sum()


def discriminator_loss(real: Judgement, fake: Judgement) -> Tensor:
    """LSGAN for the discriminators, without TPR: real -> 1, fake -> 0."""
    pairs = zip(real, fake, strict=True)
    return torch.stack([((1 - r) ** 2).mean() + (f**2).mean() for (r, _), (f, _) in pairs]).sum()


def feature_loss(real: Judgement, fake: Judgement) -> Tensor:
    """Twice the sum of mean |difference| over all feature maps."""
    pairs = [
        pair for (_, r), (_, f) in zip(real, fake, strict=True) for pair in zip(r, f, strict=True)
    ]
    return 2 * torch.stack([(r.detach() - f).abs().mean() for r, f in pairs]).sum()


def tpr_loss(a: Judgement, b: Judgement) -> Tensor:
    """Truncated pointwise relativistic loss: (real, fake) for judges, (fake, real) for the generator.

    Pushes up those outputs of `a` that exceed `b` by less than the median, by at most tau a judge.
    [HiFTNet, sec. 2.4; StyleTTS 2, arXiv:2306.07691]"""
    terms = []
    for (x, _), (y, _) in zip(a, b, strict=True):
        gap = x - y - (x - y).median()
        low = gap < 0
        r = (gap**2 * low).sum() / low.sum().clamp(min=1)
        terms.append(TPR_TAU - F.relu(TPR_TAU - r))
    return torch.stack(terms).sum()


def generator_loss(
    real: Judgement, fake: Judgement, mel_l1: Tensor | float = 0.0, f0_l1: Tensor | float = 0.0
) -> Tensor:
    """CosyVoice's sum: adversarial + 2 features + 45 mel + TPR + F0.

    mel_l1: mean |log-mel difference| with bins up to rate / 2; f0_l1: mean |difference| in Hz."""
    gan = adversarial_loss(fake) + 2 * feature_loss(real, fake) + tpr_loss(fake, real)
    return gan + 45 * mel_l1 + f0_l1


RESOLUTIONS = ((2048, 512), (1024, 256), (512, 128), (256, 64))  # (n_fft = window, hop), samples


def stft_loss(wav: Tensor, target: Tensor, floor: float = 1e-3) -> Tensor:
    """Multi-resolution STFT distance of (B, S) waves: mean |log ratio| + spectral convergence.

    The longest window (93 ms) resolves harmonics, the shortest (12 ms) the pulses of a low voice.
    Ours, for training without discriminators. [Yamamoto et al. 2020, arXiv:1910.11480, sec. 2.2]"""
    terms = []
    for n_fft, hop in RESOLUTIONS:
        window = torch.hann_window(n_fft, device=wav.device)
        x, y = (magnitude(w, n_fft, hop, window) for w in (wav, target))
        terms.append((y - x).norm() / y.norm().clamp(min=floor))
        terms.append(((x + floor).log() - (y + floor).log()).abs().mean())
    return torch.stack(terms).sum() / len(RESOLUTIONS)


# ---- public weights -----------------------------------------------------------------------------

G, V = "parametrizations.weight.original0", "parametrizations.weight.original1"
_PARTS = {
    r"f0_predictor\.condnet\.0": "f0.convs.0",
    r"f0_predictor\.condnet\.2": "f0.convs.1",
    r"f0_predictor\.condnet\.4": "f0.convs.2",
    r"f0_predictor\.condnet\.6": "f0.convs.3",
    r"f0_predictor\.condnet\.8": "f0.convs.4",
    r"f0_predictor\.classifier": "f0.out",
    r"m_source\.l_linear": "source.mix",
    r"conv_pre": "pre",
    r"ups\.(\d)": r"ups.\1",
    r"source_downs\.(\d)": r"downs.\1",
    r"source_resblocks\.(\d)\.(convs\d\.\d)": r"source_blocks.\1.\2",
    r"source_resblocks\.(\d)\.activations(\d\.\d)": r"source_blocks.\1.snakes\2",
    r"resblocks\.(\d)\.(convs\d\.\d)": r"blocks.\1.\2",
    r"resblocks\.(\d)\.activations(\d\.\d)": r"blocks.\1.snakes\2",
    r"conv_post": "post",
}
# a normed weight is stored as weight_g and weight_v, or as torch's parametrizations, or folded
NAMES = {rf"{old}\.weight_g": f"{new}.{G}" for old, new in _PARTS.items()}
NAMES |= {rf"{old}\.weight_v": f"{new}.{V}" for old, new in _PARTS.items()}
_LEAF = r"\.(?P<leaf>weight|bias|alpha|parametrizations\.weight\.original[01])"
NAMES |= {old + _LEAF: new + r".\g<leaf>" for old, new in _PARTS.items()}


def load_public(model: HiFT, tensors: Mapping[str, Tensor], what: str = "hift.pt") -> HiFT:
    """Fill `model` from tensors with public names, weight norm split or folded on either side.

    Raises ValueError that names every tensor that does not fit."""
    ours, wanted = rename(tensors, NAMES), model.state_dict()
    for key in [k for k in ours if k.endswith("." + G) and k not in wanted]:  # model is folded
        stem = key.removesuffix(G)
        if stem + V in ours:
            g, v = ours.pop(key), ours.pop(stem + V)
            ours[stem + "weight"] = torch._weight_norm(v, g, 0)
    for key in [k for k in ours if k.endswith(".weight") and k not in wanted]:  # file is folded
        stem = key.removesuffix("weight")
        if stem + G in wanted:
            w = ours.pop(key)
            ours[stem + G], ours[stem + V] = (
                w.flatten(1).norm(dim=1).view(-1, *[1] * (w.ndim - 1)),
                w,
            )
    load_strict(model, ours, what)
    return model


if __name__ == "__main__":
    vocoder = HiFT(TINY).fold()
    mel = torch.randn(1, TINY.mels, 86) - 5  # one second
    with torch.inference_mode():
        wav = vocoder(mel)
    print(f"mel {tuple(mel.shape)} -> wav {tuple(wav.shape)}")
    print(f"{sum(p.numel() for p in vocoder.parameters()):,} parameters")
