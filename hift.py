"""HiFT: log-mel to waveform, a neural source-filter vocoder whose output is a short inverse STFT.

    source = tanh(w . [sin(2 pi h sum f0 / rate + phi_h) | noise])         h = 1..9 harmonics
    wav    = iSTFT(min(exp(a), 100), angle = sin(b)),   (a, b) = net(mel, STFT(source))

    mel (B, M, F) --F0Predictor--> f0 (B, F) --Source--> (B, 256 F) --STFT 16/4--> (B, 18, 64 F + 1)
     '--conv--> (B, C, F) --x8, + source, ResBlocks--> (B, C/2, 8 F) --x8, + source, ResBlocks-->
        (B, C/4, 64 F + 1) --conv--> (B, 18, 64 F + 1) --iSTFT 16/4--> wav (B, 256 F)

A sine at the right pitch comes in, so the network only shapes it. Training: mel or STFT distance,
then HiFi-GAN's discriminators. As in the public model there is no padding mask: a convolution at
the end of an item would see the padding, so vocode items one by one.
[CosyVoice 300M, hift.pt; HiFTNet, Li et al. 2023, arXiv:2309.09493; HiFi-GAN, arXiv:2010.05646]
"""

import math
from collections.abc import Callable, KeysView, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from weights import load_strict, match

Maybe = Tensor | None
MAX_MAGNITUDE = 100.0  # of one bin of the inverse STFT
MEL_CENTRE, MEL_SPREAD = -5.5, 2.0  # of natural log-mels of speech, for the start of training only
TPR_TAU = 0.04
RESOLUTIONS = ((2048, 512), (1024, 256), (512, 128), (256, 64))  # (n_fft = window, hop), samples
G, V = "parametrizations.weight.original0", "parametrizations.weight.original1"  # w = g v / ||v||
Picture = Callable[[Tensor], Tensor]
Judgement = list[tuple[Tensor, list[Tensor]]]  # of each discriminator: output (B, n), feature maps


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
        lists = self.upsample, self.upsample_kernels, self.source_kernels
        if len({len(x) for x in lists}) > 1:
            raise ValueError(f"upsample, its kernels and source_kernels differ in length: {lists}")
        if self.channels % 2 ** len(self.upsample):
            raise ValueError(f"channels={self.channels} cannot be halved at each of {lists[0]}")
        if any(k < s or (k - s) % 2 for k, s in zip(lists[1], lists[0], strict=True)):
            raise ValueError(f"upsample_kernels={lists[1]} must exceed {lists[0]} by even numbers")
        if any(k % 2 == 0 for k in (*self.kernels, *self.source_kernels)):
            raise ValueError(f"kernels={self.kernels} and source_kernels={lists[2]} must be odd")

    @property
    def samples(self) -> int:
        """Samples of one mel frame."""
        return math.prod(self.upsample) * self.hop


TINY = HiFTConfig(channels=64, f0_channels=128)


class F0Predictor(nn.Module):
    def __init__(self, mels: int, channels: int) -> None:
        super().__init__()
        convs = (nn.Conv1d(width, channels, 3, padding=1) for width in (mels, *[channels] * 4))
        self.convs = nn.Sequential(*(x for conv in convs for x in (weight_norm(conv), nn.ELU())))
        self.out = nn.Linear(channels, 1)

    def forward(self, mel: Tensor) -> Tensor:
        """mel (B, M, F) -> f0 (B, F) in Hz, about 0 where unvoiced."""
        return self.out(self.convs(mel).transpose(1, 2)).squeeze(-1).abs()


class Source(nn.Module):
    def __init__(self, config: HiFTConfig) -> None:
        super().__init__()
        self.config = config
        self.mix = nn.Linear(config.harmonics + 1, 1)

    @torch.no_grad()
    def sines(self, f0: Tensor, phase: Maybe = None, noise: Maybe = None) -> Tensor:
        """f0 (B, F) Hz -> (B, S, h): sines where voiced, noise where not. See forward."""
        c, h = self.config, self.config.harmonics + 1
        f0 = f0.float().repeat_interleave(c.samples, 1)[..., None]  # (B, S, 1)
        if phase is None:
            phase = math.pi * (2 * torch.rand(len(f0), h, device=f0.device) - 1)
            phase[:, 0] = 0  # the fundamental starts at 0
        if noise is None:
            noise = torch.randn(*f0.shape[:2], h, device=f0.device).transpose(1, 2)  # (B, h, S)
        steps = f0 * torch.arange(1, h + 1, device=f0.device) / c.rate  # (B, S, h) cycles a sample
        turns = steps.cumsum(1) % 1  # in fp32 over the whole utterance, as the public model does
        sines = c.sine_amp * torch.sin(2 * math.pi * turns + phase.reshape(-1, 1, h))
        voiced = (f0 > c.voiced_hz).float()  # (B, S, 1)
        loudness = voiced * c.noise_std + (1 - voiced) * c.sine_amp / 3
        return sines * voiced + loudness * noise.float().transpose(1, 2)  # (B, S, h)

    def forward(self, f0: Tensor, phase: Maybe = None, noise: Maybe = None) -> Tensor:
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
            return weight_norm(nn.Conv1d(channels, channels, kernel, dilation=d, padding="same"))

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
        init_for_training(self)

    def forward(
        self, mel: Tensor, f0: Maybe = None, phase: Maybe = None, noise: Maybe = None
    ) -> Tensor:
        """mel (B, M, F) natural log, f0 (B, F) Hz or None = predicted -> wav (B, samples * F).

        phase, noise: see Source. No gradient reaches f0: the predictor learns from its own loss."""
        return self.decode(mel, self.source(self.f0(mel) if f0 is None else f0, phase, noise))

    def decode(self, mel: Tensor, source: Tensor) -> Tensor:
        """mel (B, M, F), source (B, samples * F) -> wav (B, samples * F) within +-limit."""
        c = self.config
        if source.shape != (wanted := (mel.shape[0], c.samples * mel.shape[2])):
            raise ValueError(f"source {(*source.shape,)}: mel {(*mel.shape,)} needs {wanted}")
        window = torch.hann_window(c.n_fft, device=mel.device)
        s = torch.stft(source.float(), c.n_fft, c.hop, window=window, return_complex=True)
        s = torch.cat([s.real, s.imag], 1)  # (B, 18, 64 F + 1)
        x, n = self.pre(mel), len(c.kernels)  # (B, C, F)
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
        wav = torch.istft(spectrum, c.n_fft, c.hop, window=window)  # (B, 256 F)
        return wav.clamp(-c.limit, c.limit)

    def fold(self) -> "HiFT":
        """Replace g v / ||v|| by its value, in place: same output, faster, not for training."""
        for module in self.modules():
            if is_parametrized(module, "weight"):
                remove_parametrizations(module, "weight")
        return self


@torch.no_grad()
def init_for_training(model: HiFT) -> None:
    """Start where the output already has the pitch of the source; HiFT itself calls it.

    With torch's own start the source is ten times weaker than the mel, and the upsampling kernels
    buzz at multiples of the frame rate instead: training learns pitch late or never."""
    c, last = model.config, model.config.channels // 2 ** len(model.config.upsample)
    with model.pre.bias.device:
        model.pre.weight = torch.randn(c.channels, c.mels, 7) * (21 * c.mels) ** -0.5 / MEL_SPREAD
        model.pre.bias.copy_(-MEL_CENTRE * model.pre.weight.sum((1, 2)))  # as if mels were centred
        for i, (size, stride) in enumerate(zip(c.upsample_kernels, c.upsample, strict=True)):
            ramp = 1 - (torch.arange(size) + 0.5 - size / 2).abs() / stride  # linear interpolation
            a, b = c.channels // 2**i, c.channels // 2 ** (i + 1)
            mix = torch.randn(a, b, 1) * a**-0.5
            model.ups[i].weight = mix * ramp.clamp(min=0) + 1e-3 * torch.randn(a, b, size)
        model.post.weight = torch.randn(c.n_fft + 2, last, 7) * 0.5 * (21 * last) ** -0.5
    model.post.bias[: c.n_fft // 2 + 1] = -2.0  # magnitudes of quiet speech
    for weight in (p for p in model.downs.parameters() if p.ndim == 3):
        nn.init.normal_(weight, std=(3 / weight[0].numel()) ** 0.5)  # as strong as the mel path
    nn.init.constant_(model.source.mix.weight, 0.2 / c.sine_amp)  # peaks near 1: more overtones
    nn.init.zeros_(model.source.mix.bias)
    convs: list[Any] = [*model.f0.convs][::2]
    for i, conv in enumerate(convs):  # keep the variance: torch's start loses it in five layers
        spread = MEL_SPREAD if i == 0 else 1.0
        conv.weight = torch.randn_like(conv.weight) * (1.5 / conv.weight[0].numel()) ** 0.5 / spread
        nn.init.zeros_(conv.bias)
    convs[0].bias.copy_(-MEL_CENTRE * convs[0].weight.sum((1, 2)))
    nn.init.normal_(model.f0.out.weight, std=50 * c.f0_channels**-0.5)  # in Hz
    nn.init.constant_(model.f0.out.bias, 100.0)


@dataclass(frozen=True)
class JudgeConfig:
    """Sizes of the discriminators; defaults: those of CosyVoice, 41.1 M + 0.28 M parameters."""

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    period_channels: tuple[int, ...] = (32, 128, 512, 1024, 1024)
    stfts: tuple[tuple[int, int, int], ...] = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
    stft_channels: int = 32


TINY_JUDGES = JudgeConfig((2, 3, 5), (8, 16, 32, 64, 64), ((1024, 240, 600), (512, 120, 240)), 12)


def magnitude(wav: Tensor, n_fft: int, hop: int, win: int) -> Tensor:
    """wav (B, S) -> linear magnitudes (B, n_fft // 2 + 1, frames), centred Hann windows."""
    window = torch.hann_window(win, device=wav.device)
    return torch.stft(wav.float(), n_fft, hop, win, window, return_complex=True).abs()


class Judge(nn.Module):
    """A stack of 2-D convolutions over `picture(wav)`, (B, S) -> (B, 1, height, width)."""

    def __init__(self, picture: Picture, convs: list[nn.Conv2d], out: nn.Conv2d) -> None:
        super().__init__()
        self.picture = picture
        self.convs = nn.ModuleList(weight_norm(conv) for conv in convs)
        self.out = weight_norm(out)

    def forward(self, wav: Tensor) -> tuple[Tensor, list[Tensor]]:
        """wav (B, S) -> output (B, n) in fp32, feature maps."""
        x, maps = self.picture(wav), []  # (B, 1, height, width)
        for conv in self.convs:
            maps.append(x := F.leaky_relu(conv(x), 0.1))
        maps.append(x := self.out(x))
        return x.flatten(1).float(), maps


def period_judge(period: int, channels: tuple[int, ...]) -> Judge:
    """Sees rows of one period, so that a column holds every period-th sample."""

    def picture(wav: Tensor) -> Tensor:
        wav = F.pad(wav, (0, -wav.shape[1] % period), mode="reflect")
        return wav.unflatten(1, (-1, period))[:, None]  # (B, 1, S/p, p)

    strides = [3] * (len(channels) - 1) + [1]
    sizes = zip((1, *channels[:-1]), channels, strides, strict=True)
    convs = [nn.Conv2d(a, b, (5, 1), (s, 1), padding=(2, 0)) for a, b, s in sizes]
    return Judge(picture, convs, nn.Conv2d(channels[-1], 1, (3, 1), padding=(1, 0)))


def spectrum_judge(stft: tuple[int, int, int], c: int) -> Judge:
    """Sees linear magnitudes, (B, 1, frames, bins). stft: n_fft, hop, window; c channels."""
    sizes = [(1, 9, 1), *[(c, 9, 2)] * 3, (c, 3, 1)]
    convs = [nn.Conv2d(a, c, (3, k), (1, s), padding=(1, k // 2)) for a, k, s in sizes]
    out = nn.Conv2d(c, 1, 3, padding=1)
    return Judge(lambda wav: magnitude(wav, *stft).transpose(1, 2)[:, None], convs, out)


class Judges(nn.Module):
    """All discriminators: by period (MPD), then by resolution (MRD)."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        widths, c = config.period_channels, config.stft_channels
        self.by_period = nn.ModuleList(period_judge(p, widths) for p in config.periods)
        self.by_stft = nn.ModuleList(spectrum_judge(s, c) for s in config.stfts)

    def forward(self, wav: Tensor) -> Judgement:
        """wav (B, S) -> what each discriminator says; near 1 = real, near 0 = generated."""
        return [judge(wav) for judge in (*self.by_period, *self.by_stft)]


def adversarial_loss(fake: Judgement) -> Tensor:
    """LSGAN for the generator: every output should be 1."""
    return torch.stack([((1 - out) ** 2).mean() for out, _ in fake]).sum()


def discriminator_loss(real: Judgement, fake: Judgement) -> Tensor:
    """LSGAN for the discriminators, without TPR: real -> 1, fake -> 0."""
    pairs = zip(real, fake, strict=True)
    return torch.stack([((1 - r) ** 2).mean() + (f**2).mean() for (r, _), (f, _) in pairs]).sum()


def feature_loss(real: Judgement, fake: Judgement) -> Tensor:
    """Twice the sum of mean |difference| over all feature maps, the outputs included."""
    terms = []
    for (_, maps), (_, others) in zip(real, fake, strict=True):
        terms += [F.l1_loss(f.float(), r.float()) for r, f in zip(maps, others, strict=True)]
    return 2 * torch.stack(terms).sum()


def tpr_loss(a: Judgement, b: Judgement) -> Tensor:
    """Truncated relativistic loss: (real, fake) for the judges, (fake, real) for the generator.

    Pushes up those outputs of `a` that exceed `b` by less than the median, by at most tau a judge.
    [HiFTNet, sec. 2.4; StyleTTS 2, arXiv:2306.07691]"""
    terms = []
    for (x, _), (y, _) in zip(a, b, strict=True):
        gap = x - y - (x - y).median()
        low = gap < 0
        r = (gap**2 * low).sum() / low.sum().clamp(min=1)
        terms.append(TPR_TAU - F.relu(TPR_TAU - r))
    return torch.stack(terms).sum()


def generator_loss(real: Judgement, fake: Judgement, mel_l1: Tensor, f0_l1: Tensor) -> Tensor:
    """CosyVoice's sum: adversarial + 2 features + 45 mel + TPR + F0.

    mel_l1: mean |log-mel difference| with bins up to rate / 2; f0_l1: mean |difference| in Hz."""
    rest = tpr_loss(fake, real) + 45 * mel_l1 + f0_l1
    return adversarial_loss(fake) + 2 * feature_loss(real, fake) + rest


def stft_loss(wav: Tensor, target: Tensor, floor: float = 1e-3) -> Tensor:
    """Multi-resolution STFT distance of (B, S) waves: mean |log ratio| + spectral convergence.

    The longest window (93 ms) resolves harmonics, the shortest (12 ms) the pulses of a low voice.
    Ours, for training without discriminators. [Yamamoto et al. 2020, arXiv:1910.11480, sec. 2.2]"""
    terms = []
    for n_fft, hop in RESOLUTIONS:
        x, y = (magnitude(w, n_fft, hop, n_fft) for w in (wav, target))
        terms.append((y - x).norm() / y.norm().clamp(min=floor))
        terms.append(((x + floor).log() - (y + floor).log()).abs().mean())
    return torch.stack(terms).sum() / len(RESOLUTIONS)


_PARTS = {
    r"f0_predictor\.condnet\.(\d)": r"f0.convs.\1",
    r"f0_predictor\.classifier": "f0.out",
    r"m_source\.l_linear": "source.mix",
    r"conv_pre": "pre",
    r"ups\.(\d)": r"ups.\1",
    r"source_downs\.(\d)": r"downs.\1",
    r"(source_)?resblocks\.(\d)\.(convs\d\.\d)": r"\1blocks.\2.\3",
    r"(source_)?resblocks\.(\d)\.activations(\d\.\d)": r"\1blocks.\2.snakes\3",
    r"conv_post": "post",
}
_LEAF = r"(?P<leaf>weight|bias|alpha|parametrizations\.weight\.original[01])"
_LEAVES = {r"weight_g": G, r"weight_v": V, _LEAF: r"\g<leaf>"}  # old split; folded or new split
NAMES = {rf"{a}\.{x}": f"{b}.{y}" for a, b in _PARTS.items() for x, y in _LEAVES.items()}


def respell(ours: dict[str, Tensor], wanted: KeysView[str]) -> dict[str, Tensor]:
    """Weights split or folded in the file as `wanted` has them: ours, changed in place."""
    for stem in {k.removesuffix(V) for k in ours.keys() - wanted if k.endswith(V)}:
        if stem + G in ours:  # the file is split, the model folded
            g, v = ours.pop(stem + G), ours.pop(stem + V)
            ours[stem + "weight"] = g * v / v.norm(dim=(1, 2), keepdim=True)
    for stem in {k.removesuffix(V) for k in wanted - ours.keys() if k.endswith(V)}:
        if stem + "weight" in ours:  # the other way round
            ours[stem + V] = v = ours.pop(stem + "weight")
            ours[stem + G] = v.norm(dim=(1, 2), keepdim=True)
    return ours


def load_public(model: HiFT, tensors: Mapping[str, Tensor], what: str = "hift.pt") -> HiFT:
    """Fill `model` from public names, weights split or folded on either side; else ValueError."""
    ours, problems = match(tensors, NAMES)
    load_strict(model, respell(ours, model.state_dict().keys()), what, problems)
    return model


if __name__ == "__main__":
    vocoder = HiFT(TINY).fold()
    mel = torch.randn(1, TINY.mels, 86) - 5  # one second
    print(f"mel {tuple(mel.shape)} -> wav {tuple(vocoder(mel).shape)}")
    print(f"{sum(p.numel() for p in vocoder.parameters()):,} parameters")
