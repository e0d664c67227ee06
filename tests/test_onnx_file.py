"""onnx_file.py on exports, made here, of models with the public module structure."""

import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import public
from onnx_file import place, read_onnx
from public import convert, open_public
from s3_units import Block, S3Config, S3Units
from speaker import CAMPlus, CAMPlusConfig, ContextLayer, Residual
from weights import as_config, load_model, read_config

onnx = pytest.importorskip("onnx")


def export(model: nn.Module, x: Tensor, path: Path, frames: int) -> None:
    """By the exporter that wrote the public files, for any length of axis `frames`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(), (x,), str(path), opset_version=11, dynamo=False,
            input_names=["x"], dynamic_axes={"x": {frames: "frames"}},
        )  # fmt: skip


def named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def random_norms(model: nn.Module) -> None:
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if x.is_floating_point():
            x.data.copy_(torch.rand_like(x) + 0.5 if "var" in name else torch.randn_like(x) * 0.2)


# --- S3 units ------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, b: Block) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = b.query, b.key, b.value, b.out

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        return self.out(scores.softmax(-1) @ self.value(x))


class S3Block(nn.Module):
    def __init__(self, b: Block) -> None:
        super().__init__()
        self.attn, self.attn_ln, self.mlp_ln = Attention(b), b.norm1, b.norm2
        self.mlp = nn.Sequential(b.up, nn.GELU(), b.down)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_ln(x))
        return x + self.mlp(self.mlp_ln(x))


class Codebook(nn.Module):
    embed: Tensor

    def __init__(self, embed: Tensor) -> None:
        super().__init__()
        self.register_buffer("embed", embed)

    def forward(self, x: Tensor) -> Tensor:
        e = self.embed.t()
        return (-(x.pow(2).sum(-1, keepdim=True) - 2 * x @ e + e.pow(2).sum(0))).argmax(-1)


class Layers(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        return self[0](x)


class PublicS3(nn.Module):
    def __init__(self, s3: S3Units) -> None:
        super().__init__()
        self.conv1, self.conv2 = s3.conv1, s3.conv2
        self.encoders: Any = nn.Module()
        self.encoders.register_buffer("positional_embedding", s3.positions)
        blocks: Any = s3.blocks
        self.blocks = nn.ModuleList(map(S3Block, blocks))
        layers = Layers([named(_codebook=Codebook(s3.codebook))])
        self.quantizer = named(rq=named(model=named(layers=layers)))

    def forward(self, mel: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2)
        x = x + self.encoders.positional_embedding[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.quantizer(x)


@pytest.mark.parametrize("strides", [(1, 2), (2, 2)])
@pytest.mark.parametrize("equal_norms", [True, False])
def test_s3_comes_back_from_its_export(
    tmp_path: Path, strides: tuple[int, int], equal_norms: bool
) -> None:
    torch.manual_seed(0)
    model = S3Units(S3Config(8, 128, 2, 2, 128, 30, strides, 32)).eval()  # all but conv1 square
    if not equal_norms:
        random_norms(model)
    theirs = PublicS3(model)
    mel = torch.randn(1, 8, 40)
    export(theirs, mel, tmp_path / "speech_tokenizer_v1.onnx", 2)
    tensors, _ = read_onnx(tmp_path / "speech_tokenizer_v1.onnx")
    assert len(tensors) == 6 + 15 * 2
    ours = open_public(tmp_path / "speech_tokenizer_v1.onnx")["s3"]
    assert isinstance(ours, S3Units)
    assert ours.cfg == model.cfg
    for name, x in model.state_dict().items():
        if name != "usage":
            assert torch.equal(ours.state_dict()[name], x), name
    assert torch.equal(ours(mel)[0], model(mel)[0])


# --- CAM++ ---------------------------------------------------------------------------------------


class Res(nn.Module):
    def __init__(self, r: Residual) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = r.conv1, r.norm1, r.conv2, r.norm2
        self.shortcut = r.shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Head(nn.Module):
    def __init__(self, h: Any) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = h.conv1, h.norm1, h.conv2, h.norm2
        self.layer1, self.layer2 = (nn.Sequential(*map(Res, s)) for s in (h.stage1, h.stage2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x.transpose(1, 2)[:, None])))
        return F.relu(self.bn2(self.conv2(self.layer2(self.layer1(x))))).flatten(1, 2)


class Gate(nn.Module):
    def __init__(self, c: ContextLayer) -> None:
        super().__init__()
        self.linear_local, self.linear1, self.linear2 = c.local, c.gate1, c.gate2

    def forward(self, x: Tensor) -> Tensor:
        gate = self.linear2(F.relu(self.linear1(x.mean(-1, keepdim=True)))).sigmoid()
        return self.linear_local(x) * gate


class DenseLayer(nn.Module):
    def __init__(self, c: ContextLayer) -> None:
        super().__init__()
        self.nonlinear1, self.linear1 = named(batchnorm=c.norm1, relu=nn.ReLU()), c.squeeze
        self.nonlinear2, self.cam_layer = named(batchnorm=c.norm2, relu=nn.ReLU()), Gate(c)

    def forward(self, x: Tensor) -> Tensor:
        h = self.cam_layer(self.nonlinear2(self.linear1(self.nonlinear1(x))))
        return torch.cat([x, h], 1)


class Stats(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean(-1), x.std(-1)], 1)


class Dense(nn.Module):
    def __init__(self, c: CAMPlus) -> None:
        super().__init__()
        self.linear, self.nonlinear = c.out, named(batchnorm=c.norm3)

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlinear(self.linear(x[..., None]).squeeze(-1))


class PublicCAMPlus(nn.Module):
    def __init__(self, c: CAMPlus) -> None:
        super().__init__()
        self.head = Head(c.head)
        parts: dict[str, nn.Module] = {}
        relu = nn.ReLU()
        blocks: Any = c.blocks
        for i, block in blocks.items():
            layers = {f"tdnnd{j}": DenseLayer(x) for j, x in block.layers.items()}
            parts[f"block{i}"] = named(**layers)
            norm = named(batchnorm=block.norm, relu=relu)
            parts[f"transit{i}"] = named(nonlinear=norm, linear=block.halve)
        self.xvector = named(
            tdnn=named(linear=c.tdnn, nonlinear=named(batchnorm=c.norm1, relu=relu)), **parts,
            out_nonlinear=named(batchnorm=c.norm2, relu=relu), stats=Stats(), dense=Dense(c),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.xvector(self.head(x))


@pytest.mark.parametrize("equal_norms", [True, False])
def test_campplus_comes_back_from_its_export(tmp_path: Path, equal_norms: bool) -> None:
    torch.manual_seed(0)
    config = CAMPlusConfig(dim=24, growth=4, bottleneck=2, init_channels=16)
    model = CAMPlus(config).eval()
    if not equal_norms:
        random_norms(model)
    fbank = torch.randn(2, 60, 80)
    export(PublicCAMPlus(model), fbank, tmp_path / "campplus.onnx", 1)
    (folder,) = convert(tmp_path / "campplus.onnx", tmp_path / "bundle")
    assert folder == tmp_path / "bundle/speaker"
    values = read_config(folder)
    assert values["source"]["file"] == "campplus.onnx"
    ours = load_model(CAMPlus(as_config(CAMPlusConfig, values)), folder)
    assert ours.cfg == config
    theirs = model(fbank)
    assert (ours(fbank) - theirs).abs().max() <= 2e-5 * theirs.abs().max()


# --- what is wrong -------------------------------------------------------------------------------


def test_places() -> None:
    assert place("/blocks.0/mlp/mlp.2/MatMul") == "blocks.0.mlp.2.MatMul"
    assert place("/head/layer1/layer1.0/conv1/Conv") == "head.layer1.0.conv1.Conv"


def test_a_weight_that_no_node_reads_is_missing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = S3Units(S3Config(8, 128, 2, 1, 128, 30, (1, 2), 32)).eval()
    theirs, path = PublicS3(model), tmp_path / "s3.onnx"
    export(theirs, torch.randn(1, 8, 40), path, 2)
    file = onnx.load(path)
    for node in file.graph.node:
        node.name = node.name.replace("attn/value/MatMul", "attn/value/Gemm")
    onnx.save(file, path)
    with pytest.raises(ValueError, match=r"1 problems\n  s3\.blocks\.0\.value\.weight: in the mod"):
        open_public(path)


@pytest.mark.parametrize("content", [b"", b"not onnx", b"\x08\x07"])
def test_foreign_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.onnx: (damaged or not an ONNX|no public file)"):
        open_public(tmp_path / "x.onnx")
    with pytest.raises(FileNotFoundError, match="no such weight file"):
        open_public(tmp_path / "y.onnx")


def test_weights_in_another_file_are_refused(tmp_path: Path) -> None:
    x = onnx.numpy_helper.from_array(torch.zeros(2000).numpy(), "head.conv1.weight")
    graph = onnx.helper.make_graph([], "g", [], [], [x])
    model = onnx.helper.make_model(graph)
    onnx.save(
        model, tmp_path / "x.onnx", save_as_external_data=True, location="w", size_threshold=0
    )
    with pytest.raises(ValueError, match="lies in another file"):
        open_public(tmp_path / "x.onnx")


def test_without_the_package_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    argv = ["public.py", "--convert", str(tmp_path / "x.onnx"), "--out", str(tmp_path)]
    (tmp_path / "x.onnx").write_bytes(b"")
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as e:
        public.run(public.main)
    assert e.value.code == 2
    assert "pip install onnx" in capsys.readouterr().err
