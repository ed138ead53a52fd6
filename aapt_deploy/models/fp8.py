"""Linear layers in FP8 (e4m3), with static scales and weights stored as FP8.

A layer with scales becomes a `Linear8`. In PyTorch it computes what an FP8 engine computes, up
to the order of sums: both operands are rounded to e4m3, products and sums are float32. In an
exported graph it leaves QuantizeLinear and DequantizeLinear nodes around a MatMul. Engines turn
this pattern into one FP8 product. The weight is a FLOAT8E4M3FN constant [out, in], quantised
once, here.

Calibration is in export/calibrate.py; attention's scales are the cache's.
"""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aapt_deploy.bundle.scales import LinearScales, Scales
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.family import family_of
from aapt_deploy.models.inputs import random_inputs
from aapt_deploy.ops.block_causal_attention import OPSET
from aapt_deploy.ops.block_causal_attention.hopper_fp8 import E4M3_MAX as E4M3_MAX
from aapt_deploy.profiles import Profile

E4M3 = torch.float8_e4m3fn


def encode(x: Tensor, scale: Tensor) -> Tensor:
    """e4m3(x / scale), to nearest even, saturating: what ONNX's QuantizeLinear does."""
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


class Linear8(nn.Module):
    """x [..., in] -> [..., out] with both operands in e4m3."""

    input_scale: Tensor  # []
    weight_scale: Tensor  # [out]
    zero: Tensor  # e4m3 []; QuantizeLinear takes its output type from it

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, scales: LinearScales) -> None:
        """Take weight e4m3 [out, in] and scales that fit it."""
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias
        input_scale = torch.tensor(float(scales.input_scale[0]))
        self.register_buffer("input_scale", input_scale, persistent=False)
        self.register_buffer("weight_scale", torch.tensor(scales.weight_scale), persistent=False)
        self.register_buffer("zero", torch.zeros((), dtype=E4M3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.onnx.is_in_onnx_export():
            return F.linear(self.rounded(x), self.dequantised(), self.bias)
        quantise, dequantise = (
            partial(torch.onnx.ops.symbolic, kind, version=OPSET)
            for kind in ("QuantizeLinear", "DequantizeLinear")
        )
        scale, zero, dtype, shape = self.input_scale, self.zero, x.dtype, self.weight.shape
        codes = quantise((x, scale, zero), dtype=E4M3, shape=x.shape)
        rounded = dequantise((codes, scale, zero), dtype=dtype, shape=x.shape)
        stored = (self.weight, self.weight_scale)
        weight = dequantise(stored, {"axis": 0}, dtype=dtype, shape=shape)
        return F.linear(rounded, weight, self.bias)

    def rounded(self, x: Tensor) -> Tensor:
        """x as the product sees it, [..., in]."""
        return encode(x, self.input_scale).to(x.dtype) * self.input_scale

    def dequantised(self) -> Tensor:
        """The weight as the product sees it, [out, in]."""
        return self.weight.to(self.weight_scale.dtype) * self.weight_scale[:, None]


class LinearLayer(NamedTuple):
    """One linear layer and whether the rules keep it as it is."""

    path: str  # inside the generator
    linear: nn.Linear
    kept_by: str  # the rule; "" for a layer that is quantised


def layers(generator: Generator, keep: Iterable[str]) -> list[LinearLayer]:
    """Return every linear layer of `generator` under the profile's rules [fp8] keep."""
    rules = list(keep)
    found = []
    for path, module in generator.named_modules():
        if isinstance(module, nn.Linear):
            names = _names(path, generator.profile)
            hits = (rule for rule in rules if any(fnmatchcase(name, rule) for name in names))
            found.append(LinearLayer(path, module, next(hits, "")))
    return found


def _names(path: str, profile: Profile) -> list[str]:
    """Return the names by which a rule may mean `path`.

    The first block is `*.first.*` as well as `*.0.*`, the last one `*.last.*`.
    """
    parts, names = path.split("."), [path]
    if parts[0] in family_of(profile).stacks:
        places = {"0": "first", str(profile.model.depth - 1): "last"}
        if word := places.get(parts[1]):
            names.append(".".join([parts[0], word, *parts[2:]]))
    return names


def apply(generator: Generator, scales: Scales, quantise: bool = True) -> None:
    """Replace every linear layer that has scales, or insert hollow weights for a trace.

    `quantise` off makes them hollow. Raises ValueError if scales do not fit.
    """
    modules = generator.named_modules()
    linears = {path: module for path, module in modules if isinstance(module, nn.Linear)}
    if unknown := sorted(scales.linear.keys() - linears.keys()):
        raise ValueError(f"scales for {', '.join(unknown[:8])}, which the generator has not")
    for path, own in scales.linear.items():
        linear = linears[path]
        if own.weight_scale.shape != (linear.out_features,):
            found, outputs = len(own.weight_scale), linear.out_features
            raise ValueError(f"{found} weight scales for {path} with {outputs} outputs")
        weight = torch.zeros((), dtype=E4M3).expand(linear.weight.shape)
        if quantise:
            weight = encode_weight(linear.weight.detach(), own)
        parent, _, name = path.rpartition(".")
        replacement = Linear8(weight, linear.bias, own).train(linear.training)
        setattr(generator.get_submodule(parent), name, replacement)


def encode_weight(weight: Tensor, scales: LinearScales) -> Tensor:
    """float32 [out, in] -> e4m3 [out, in]."""
    return encode(weight, torch.tensor(scales.weight_scale)[:, None])


class Coverage(NamedTuple):
    """Where the operations of one graph are done."""

    graph: str
    gflop: float  # linear layers, convolutions, attention over a full cache
    fp8: float  # share of it in FP8
    rest: dict[str, float]  # what is not, and why -> share


def coverage(
    profile: Profile, modules: dict[str, nn.Module], generator: Generator
) -> list[Coverage]:
    """Return the share of each graph that is in FP8, after `apply`.

    Counted from the shapes of a run on hollow weights.
    """
    found_layers = layers(generator, profile.fp8.keep)
    kept = {f"generator.{layer.path}": layer.kept_by for layer in found_layers}
    found = []
    for name, signature in family_of(profile).signatures(profile).items():
        parts: dict[str, float] = {}
        handles = [
            module.register_forward_hook(_counter(parts, kept.get(path, "")))
            for path, module in modules[name].named_modules()
        ]
        specs = signature.read
        with torch.no_grad():
            rows = [(s.name, s.shape, s.dtype) for s in specs]
            modules[name](*random_inputs(rows, 0, profile.cache_tokens))
        for handle in handles:
            handle.remove()
        if name == "generator":
            keys = profile.cache_tokens + profile.block_tokens
            pairs = profile.block_tokens * keys
            flops = 4.0 * profile.model.depth * pairs * profile.model.dim
            parts["attention, FP8 where its caches are"] = flops
        total = sum(parts.values())
        share = parts.pop(IN_FP8, 0.0) / total
        rest = {why: flops / total for why, flops in parts.items()}
        found.append(Coverage(name, total / 1e9, share, rest))
    return found


IN_FP8 = "fp8"


def _counter(
    parts: dict[str, float], rule: str
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A hook that adds a layer's operations to `parts`."""

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, Linear8 | nn.Linear):
            wide = f"kept by rule {rule}" if rule else "without scales"
            why = IN_FP8 if isinstance(module, Linear8) else wide
            parts[why] = parts.get(why, 0.0) + 2.0 * output.numel() * module.weight.shape[1]
        elif isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d):
            positions = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
            flops = 2.0 * positions.numel() * module.weight[0].numel()
            parts["convolution"] = parts.get("convolution", 0.0) + flops

    return count
