"""The weights of two ONNX files by their public names: CosyVoice's S3 tokenizer, and CAM++.

    initializer <- node that reads it, /blocks.0/mlp/mlp.2/MatMul -> encoder.blocks.0.mlp.2.weight

Exported initializers are mostly anonymous ("onnx::MatMul_1532"), so each is named after the node
that reads it; MatMul's are stored (in, out) and turned round. In CAM++ most convolutions have
swallowed the BatchNorm behind them: the folded weight and bias come back as that convolution and a
BatchNorm that only adds the bias. The exporter stores equal initializers once and reaches them
through Identity nodes. The `onnx` package is only needed here, where a file is converted once.
[spec of both exports: CosyVoice-300M speech_tokenizer_v1.onnx, campplus.onnx]
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weights import reason

BN_EPS = 1e-5
S3 = {  # node -> public name; a T in front: turned round
    r"blocks\.(\d+)\.attn\.(query|key|value|out)\.MatMul": r"T encoder.blocks.\1.attn.\2.weight",
    r"blocks\.(\d+)\.attn\.(query|value|out)\.Add": r"encoder.blocks.\1.attn.\2.bias",
    r"blocks\.(\d+)\.(attn_ln|mlp_ln)\.Mul": r"encoder.blocks.\1.\2.weight",
    r"blocks\.(\d+)\.(attn_ln|mlp_ln)\.Add_1": r"encoder.blocks.\1.\2.bias",
    r"blocks\.(\d+)\.mlp\.([02])\.MatMul": r"T encoder.blocks.\1.mlp.\2.weight",
    r"blocks\.(\d+)\.mlp\.([02])\.Add": r"encoder.blocks.\1.mlp.\2.bias",
    r"quantizer\.rq\.model\.layers\.0\._codebook\.Pow_1": r"T quantizer._codebook.embed",
}
FOLDED = {  # convolution of CAM++ -> the BatchNorm that it swallowed
    r"(head\.|head\.layer\d\.\d\.)conv([12])": r"\1bn\2",
    r"(head\.layer\d\.\d\.shortcut)\.0": r"\1.1",
    r"xvector\.tdnn\.linear": "xvector.tdnn.nonlinear.batchnorm",
    r"(xvector\.block\d\.tdnnd\d+)\.linear1": r"\1.nonlinear2.batchnorm",
    r"xvector\.transit3\.linear": "xvector.out_nonlinear.batchnorm",
}
NAMED = r"(head|xvector)\..+"  # initializers of CAM++ that kept their PyTorch name


def read_onnx(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """-> tensors under public names, {"strides": of the first two convolutions}."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as e:
        raise ValueError(f"{path}: reading ONNX takes one more package: pip install onnx") from e
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weight file; see README.md on where to get it")
    try:
        graph = onnx.load(path, load_external_data=False).graph
        values = {x.name: array(onnx, x) for x in graph.initializer}
    except (DecodeError, ValueError, TypeError) as e:
        raise ValueError(f"{path}: damaged or not an ONNX file ({reason(e)})") from e
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in values:
            values[node.output[0]] = values[node.input[0]]
    convs = [node for node in graph.node if node.op_type == "Conv"]
    if any(re.match(r"xvector\.", place(node.name)) for node in convs):
        return {k: v.clone() for k, v in campplus(values, convs)}, {}  # equal ones were one
    steps = [a.ints[0] for node in convs for a in node.attribute if a.name == "strides"]
    tensors = {k: v.clone() for k, v in s3(values, graph.node, convs)}
    return tensors, {"strides": tuple(steps[:2]) or (1, 2)}


def array(onnx: Any, initializer: Any) -> Tensor:
    if initializer.data_location == onnx.TensorProto.EXTERNAL:
        raise ValueError(f"{initializer.name} lies in another file")
    return torch.from_numpy(onnx.numpy_helper.to_array(initializer).copy())


def place(name: str) -> str:
    """'/blocks.0/mlp/mlp.2/MatMul' -> 'blocks.0.mlp.2.MatMul': a child repeats its parent."""
    parts: list[str] = []
    for part in name.strip("/").split("/"):
        parts.append(part.removeprefix(f"{parts[-1]}.") if parts else part)
    return ".".join(parts)


def s3(
    values: dict[str, Tensor], nodes: list[Any], convs: list[Any]
) -> Iterator[tuple[str, Tensor]]:
    """(public name, tensor) of speech_tokenizer_v1.onnx; convolutions go by their order."""
    for name in values:
        if name.endswith("positional_embedding"):
            yield "encoder.positional_embedding", values[name]
    for i, conv in enumerate(convs[:2], 1):
        for k, x in enumerate(conv.input[1:]):
            if x in values:
                yield f"encoder.conv{i}.{('weight', 'bias')[k]}", values[x]
    for node in nodes:
        read = [values[x] for x in node.input if x in values]
        for row, name in S3.items():
            if read and re.fullmatch(row, place(node.name)):
                public = re.sub(row, name, place(node.name))
                yield public.removeprefix("T "), read[0].T if public[:2] == "T " else read[0]


def campplus(values: dict[str, Tensor], convs: list[Any]) -> Iterator[tuple[str, Tensor]]:
    """(public name, tensor) of campplus.onnx."""
    for name, value in values.items():
        if re.fullmatch(NAMED, name):
            yield name, value
    for conv in convs:
        name, inputs = place(conv.name).removesuffix(".Conv"), conv.input[1:]
        row = next((row for row in FOLDED if re.fullmatch(row, name)), None)
        if row and len(inputs) == 2 and inputs[0] in values and inputs[1] in values:
            norm, bias = re.sub(row, FOLDED[row], name), values[inputs[1]]
            yield f"{name}.weight", values[inputs[0]]
            yield f"{norm}.weight", torch.ones_like(bias)
            yield f"{norm}.bias", bias
            yield f"{norm}.running_mean", torch.zeros_like(bias)
            yield f"{norm}.running_var", torch.full_like(bias, 1 - BN_EPS)


if __name__ == "__main__":
    for name in ("/blocks.0/mlp/mlp.2/MatMul", "/xvector/block3/tdnnd16/linear1/Conv"):
        print(name, "->", place(name))
