"""whisper_enc.py against transformers and the TASTE golden vectors; padding, taps, messages."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from weights import load_strict, rename
from whisper_enc import (
    NAMES,
    NAMES_OPENAI,
    SKIP,
    SKIP_OPENAI,
    TINY,
    EncoderConfig,
    WhisperEncoder,
    sinusoids,
)

GOLDEN = Path(__file__).parent / "golden" / "taste"
SMALL = EncoderConfig(n_mels=12, width=24, heads=3, layers=3, ffn=40, max_frames=30)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def randomize(model: nn.Module, seed: int = 0) -> None:
    """No parameter stays at 0 or 1, so that a bias or a norm that is left out shows."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)


def build(cfg: EncoderConfig, seed: int = 0) -> WhisperEncoder:
    torch.manual_seed(seed)
    model = WhisperEncoder(cfg).eval()
    randomize(model, seed)
    return model


@pytest.mark.parametrize("seed", [0, 1])
def test_equals_transformers(seed: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        vocab_size=50, num_mel_bins=12, d_model=24, encoder_layers=3, encoder_attention_heads=3,
        encoder_ffn_dim=40, decoder_layers=1, decoder_attention_heads=3, decoder_ffn_dim=8,
        max_source_positions=30, max_target_positions=8, pad_token_id=0, bos_token_id=1,
        eos_token_id=1, decoder_start_token_id=1,
    )  # fmt: skip
    theirs = transformers.WhisperForConditionalGeneration(config).eval()
    torch.testing.assert_close(theirs.model.encoder.embed_positions.weight.data, sinusoids(30, 24))
    randomize(theirs, seed)
    ours = WhisperEncoder(SMALL).eval()
    load_strict(ours, rename(theirs.state_dict(), NAMES, SKIP))

    mel = torch.randn(2, 12, 60)
    with torch.no_grad():
        last, taps = ours(mel, taps=(0, 1, 2, 3))
        want = theirs.model.encoder(mel, output_hidden_states=True)
    close(last, want.last_hidden_state)
    for k in range(3):
        close(taps[k], want.hidden_states[k])
    close(ours.norm(taps[3]), want.hidden_states[3])  # theirs is after the final norm already
    assert taps.keys() == {0, 1, 2, 3}


def test_golden_keys_and_values() -> None:
    golden = load_file(GOLDEN / "aggregator.safetensors")
    public = {k[8:]: v for k, v in golden.items() if k.startswith("weights.")}
    model = WhisperEncoder(EncoderConfig(16, 32, 4, 4, 64, 40)).eval()
    load_strict(model, rename(public, NAMES, SKIP))
    with torch.no_grad():
        last, taps = model(golden["mel"].mT, taps=(2,))
    close(last, golden["states_for_key"])
    close(taps[2], golden["states_for_val"])


def test_names_of_the_released_checkpoint_and_of_openai() -> None:
    state = WhisperEncoder(SMALL).state_dict()
    tower = "audio_tower.audio_joint_encoder_segmenter.audio_encoder.encoder."
    for prefix in (tower, "model.encoder.", "encoder."):
        layer = f"{prefix}layers.2."
        public = ["fc2.bias", "self_attn.out_proj.bias", "final_layer_norm.weight"]
        ours = rename({layer + k: torch.zeros(1) for k in public}, NAMES, SKIP)
        assert [*ours] == [
            "blocks.2.mlp.2.bias",
            "blocks.2.attn.out.bias",
            "blocks.2.mlp_norm.weight",
        ]
        assert ours.keys() <= state.keys()
    names = {"positions": "positional_embedding", "norm.": "ln_post.", "_norm.": "_ln."}
    openai = {}
    for key, value in state.items():
        row = next((k for k in ("_norm.", "norm.", "positions") if k in key), None)
        openai["encoder." + (key.replace(row, names[row]) if row else key)] = value
    back = rename(openai | {"decoder.ln.bias": torch.zeros(1)}, NAMES_OPENAI, SKIP_OPENAI)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)


@pytest.mark.parametrize("strides", [(1, 2), (2, 2), (1, 1), (2, 3)], ids=str)
def test_padded_batch_equals_single_items(strides: tuple[int, int]) -> None:
    cfg = EncoderConfig(12, 24, 3, 2, 40, 60, strides)
    model, lengths = build(cfg), torch.tensor([37, 36, 11, 1])
    mel = torch.randn(4, 12, 41)
    keep = torch.arange(41) < lengths[:, None]
    with torch.no_grad():
        last, taps = model(mel.masked_fill(~keep[:, None], 9.0), keep, taps=(0, 1))
        for i, n in enumerate(lengths.tolist()):
            single, single_taps = model(mel[i : i + 1, :, :n], taps=(0, 1))
            t = cfg.frames(n)
            assert single.shape[1] == t == cfg.out_lengths(lengths)[i]
            close(last[i : i + 1, :t], single)
            close(taps[0][i : i + 1, :t], single_taps[0])
            close(taps[1][i : i + 1, :t], single_taps[1])


def test_keep_per_encoder_frame_is_exact_for_whole_strides() -> None:
    model, mel = build(TINY), torch.randn(2, 80, 48)
    keep = torch.arange(12) < torch.tensor([[12], [5]])
    with torch.no_grad():
        last, _ = model(mel, keep)
        close(last[1:, :5], model(mel[1:, :, :20])[0])
        close(last[:1], model(mel[:1])[0])


def test_everything_real_is_the_same_as_no_mask() -> None:
    model, mel = build(TINY), torch.randn(2, 80, 40)
    with torch.no_grad():
        close(model(mel, torch.ones(2, 10, dtype=torch.bool))[0], model(mel)[0])


def test_a_tap_changes_nothing_and_layers_see_the_future() -> None:
    model, mel = build(TINY), torch.randn(1, 80, 40)
    with torch.no_grad():
        last, taps = model(mel)
        assert taps == {}
        assert torch.equal(last, model(mel, taps=(4, 1))[0])
        mel[..., -1] += 1
        assert (model(mel)[0][:, 0] - last[:, 0]).abs().max() > 1e-6


def test_gradient_reaches_every_parameter_but_the_stored_positions() -> None:
    model = build(TINY)
    model(torch.randn(2, 80, 40))[0].pow(2).mean().backward()
    without = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ["positions"]


def test_messages() -> None:
    model = WhisperEncoder(TINY)
    with pytest.raises(ValueError, match=r"3004 mel frames give 751 frames.*ends at 750.*3000 mel"):
        model(torch.zeros(1, 80, 3004))
    with pytest.raises(ValueError, match=r"no layer \[5, -1\] to tap: 0 \(input\) to 4"):
        model(torch.zeros(1, 80, 8), taps=(1, 5, -1))
    with pytest.raises(ValueError, match=r"mel has shape \[1, 8, 80\], wanted \[B, 80, F >= 1\]"):
        model(torch.zeros(1, 8, 80))
    with pytest.raises(ValueError, match=r"keep is torch.bool \[2, 3\], wanted bool \[2, 2\]"):
        model(torch.zeros(2, 80, 8), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"items \[1\] have no frame"):
        model(torch.zeros(2, 80, 8), torch.tensor([[True, True], [False, False]]))
    with pytest.raises(ValueError, match=r"width=10 must be a multiple of heads=4"):
        EncoderConfig(width=10, heads=4)
    with pytest.raises(ValueError, match="two strides"):
        EncoderConfig(strides=(0, 2))


def test_default_is_the_released_size() -> None:
    with torch.device("meta"):
        model = WhisperEncoder(EncoderConfig())
    assert sum(p.numel() for p in model.parameters()) == 636_968_960  # spec/taste.md, section 0
