"""Calibrate FP8 scales: modelopt measures a checkpoint's activations while it streams.

The generator runs on its own output (student-forced) from every start frame while its window fills
and turns over. It flies in all directions, and prompts change on the way. Largest magnitudes, times
a margin, set one static scale for each linear layer's input and one for each output channel of its
weight. They also set those of queries, keys and values for an FP8 cache. Layers that the profile's
[fp8] rules keep get none.

The networks are converted in place and cannot be used for anything else afterwards. Nothing here
writes a graph or a file; `aapt_deploy.bundle.scales` does.
"""

import contextlib
import io
import itertools
import json
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aapt_deploy.backends.torch_eager import EagerEngines
from aapt_deploy.backends.trial import Report
from aapt_deploy.bundle.scales import FORMAT, LinearScales, Scales
from aapt_deploy.errors import ProfileError
from aapt_deploy.models import fp8
from aapt_deploy.models.checkpoint import Checkpoint
from aapt_deploy.models.family import family_of
from aapt_deploy.ops.block_causal_attention import hopper_fp8
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.loop import Steering, rollout
from aapt_deploy.rollout.starts import Start, coarse_picture

SPARE_BLOCKS = 2  # that a rollout goes on once its window is full
PROMPT_BLOCKS = 3  # blocks between two prompts
NOISE_STARTS = 4  # rollouts of a family that starts from noise


def calibrate(checkpoint: Checkpoint, report: Report, seed: int = 0) -> Scales:
    """Return the scales of `checkpoint` under its profile's [fp8] section.

    The same seed gives the same scales. `checkpoint`'s generator is converted.
    Raises ProfileError if the rules leave nothing to quantise.
    """
    profile, generator = checkpoint.profile, checkpoint.generator
    chosen = [layer for layer in fp8.layers(generator, profile.fp8.keep) if not layer.kept_by]
    if not chosen:
        raise ProfileError(
            f"profile {profile.name}: [fp8] keep = {list(profile.fp8.keep)} leaves no linear layer "
            f"of {profile.model.depth} blocks to quantise",
            "shorten the list in the profile's [fp8] section",
        )
    attention = AttentionRanges(profile)
    passes = 0

    def rollouts(_: Any) -> None:
        nonlocal passes
        with attention:
            passes = _rollouts(checkpoint, seed, report)

    with _quiet():
        import modelopt.torch.quantization as mtq

        e4m3 = {"num_bits": (4, 3)}
        config: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
        for layer in chosen:
            config += [
                {"quantizer_name": f"{layer.path}.weight_quantizer", "cfg": e4m3 | {"axis": 0}},
                {"quantizer_name": f"{layer.path}.input_quantizer", "cfg": e4m3 | {"axis": None}},
            ]
        mtq.quantize(generator, {"quant_cfg": config, "algorithm": "max"}, rollouts)
    linear = {
        layer.path: _linear_scales(generator.get_submodule(layer.path), profile.fp8.margin)
        for layer in chosen
    }
    calibration = {
        "tool": "nvidia-modelopt",
        "algorithm": "max",
        "seed": seed,
        "starts": len(_starts(checkpoint, seed)),
        "passes": passes,
    }
    metadata = {
        "format": FORMAT,
        "profile": profile.name,
        "checkpoint_sha256": checkpoint.sha256,
        "margin": repr(profile.fp8.margin),
        "keep": json.dumps(profile.fp8.keep),
        "calibration": json.dumps(calibration),
    }
    return Scales(linear, attention.scales(profile.fp8.margin), metadata)


def bf16_above(values: np.ndarray) -> np.ndarray:
    """Return the least numbers of bf16, as float32, that are not below positive `values`.

    TensorRT's FP8 products read their scales in bf16. Rounded here, they are equal everywhere.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits + np.uint32(0xFFFF) & np.uint32(0xFFFF0000)).view(np.float32)


def _linear_scales(module: Any, margin: float) -> LinearScales:
    """Return the scales of one layer. Keep the scale 1 if its input was always zero."""

    def scale(amax: Tensor, margin: float) -> np.ndarray:
        largest = amax.detach().float().reshape(-1).numpy()
        scaled = largest * np.float32(margin / fp8.E4M3_MAX)
        return bf16_above(np.where(largest > 0, scaled, np.float32(1)))

    weight = scale(module.weight_quantizer.amax, 1.0)  # weights are known: no margin
    return LinearScales(scale(module.input_quantizer.amax, margin), weight)


def _rollouts(checkpoint: Checkpoint, seed: int, report: Report) -> int:
    """Run the generator as a stream does. Return the number of its passes."""
    profile, starts = checkpoint.profile, _starts(checkpoint, seed)
    window, per_block = profile.window, profile.video.block_frames
    blocks = (window.sink_frames + window.frames) // per_block + SPARE_BLOCKS
    engines = EagerEngines(checkpoint, torch.get_num_threads(), "fp32")
    flights = family_of(profile).flights
    for number, start in enumerate(starts):
        report(f"calibrating on rollout {number + 1} of {len(starts)}, {blocks} blocks")

        def steer(block: int, number: int = number) -> Steering:
            text = starts[(number + block // PROMPT_BLOCKS) % len(starts)].text
            return Steering(flights[(number + block // 2) % len(flights)], text)

        frames = rollout(engines, profile, start.image, steer, seed + number)
        for _ in itertools.islice(frames, 1 + blocks):
            pass
    return len(starts) * blocks * profile.passes


def _starts(checkpoint: Checkpoint, seed: int) -> list[Start]:
    """Return the checkpoint's start frames, or one coarse random picture if it has none.

    A family that starts from noise gets none. Embedded prompts are drawn, because there is no text
    encoder.
    """
    profile, rng = checkpoint.profile, np.random.default_rng(seed)
    family, given = family_of(profile), list(checkpoint.start_frames.values())
    if family.start_is_block:
        drawn = (family.random_text(profile, rng) for _ in range(NOISE_STARTS))
        return [Start(None, "", text) for text in drawn]
    if given and profile.text.kind == "vocabulary":
        prompts = [family.text_of(profile, frame.prompt) for frame in given]
    images = [frame.image.numpy() for frame in given] or [coarse_picture(profile, rng)]
    if not given or profile.text.kind != "vocabulary":
        prompts = [family.random_text(profile, rng) for _ in images]
    return [Start(image, "", text) for image, text in zip(images, prompts, strict=True)]


class AttentionRanges(TorchDispatchMode):
    """Record the largest magnitudes of queries, keys and values over every pass under it.

    By layer, head and channel.
    """

    def __init__(self, profile: Profile) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.text_tokens, self.depth = profile.cached_text_tokens, profile.model.depth
        self.calls = 0
        # q, k, v of each layer: [3, layers, H, D]
        self.largest = torch.zeros(3, profile.model.depth, profile.model.heads, profile.head_dim)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aapt.block_causal_attention.default:
            q, k, v, k_cache, v_cache, _ = args
            text = slice(self.text_tokens)
            inputs = ([q], [k, k_cache[:, text]], [v, v_cache[:, text]])
            for found, seen in zip(self.largest[:, self.calls % self.depth], inputs, strict=True):
                for x in seen:
                    if x.shape[1]:
                        found.copy_(torch.maximum(found, x.abs().amax((0, 1))))
            self.calls += 1
        return func(*args, **(kwargs or {}))

    def scales(self, margin: float) -> list[hopper_fp8.Scales]:
        """Return the scales of every layer's attention. K is not centred."""
        # [3, layers, 1, H, D]: one sample with the largest of each channel
        largest = (self.largest * margin).numpy()[:, :, None]
        return [hopper_fp8.calibrate(*largest[:, layer]) for layer in range(self.depth)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence modelopt's summary and its warnings about optional packages.

    None of it is about the user's checkpoint.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
