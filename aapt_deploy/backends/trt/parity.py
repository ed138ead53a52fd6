"""The plans of an engine against the graphs that they were built from: one pass of each, same inputs, before anything is timed.

The reference is ONNX Runtime on the CPU with the exported graphs, FP8 quantisation included where they have it: so a difference is TensorRT's, or our
kernels', and not the precision's. Only one graph's weights are in memory at a time. What a precision costs is `aapt quality`'s question.
"""

from typing import Any

import numpy as np

from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.errors import ParityError
from aapt_deploy.models.aapt.signature import layer_names, signatures
from aapt_deploy.rollout.engine import Engines
from aapt_deploy.rollout.starts import Start, all_starts
from aapt_deploy.video.metrics import psnr_db


def start_of(bundle: Bundle) -> Start:
    """A start of the bundle; where the prompt is an external encoder's, random embeddings do."""
    first = all_starts(bundle)[0]
    if bundle.profile.text.kind != "embedding" or not bundle.profile.text.tokens:
        return first
    shape = signatures(bundle.profile)["prompt"].spec("text").shape
    return first._replace(text=np.random.default_rng(0).standard_normal(shape, np.float32))


def compare(engines: Engines, bundle: Bundle, first: Start) -> dict[str, Any]:
    """One pass of every graph against the exported graph in ONNX Runtime, from the same inputs: errors relative to the reference's size.

    Raises ParityError above the profile's `quality.latent_error`, or for frames under its `quality.psnr_db`.
    """
    profile, limits = bundle.profile, bundle.profile.quality
    latent = _reference(bundle, "encoder", {"image": first.image})["latent"]
    figures: dict[str, Any] = {
        "encoder": _error(engines["encoder"].run(image=first.image)["latent"], latent)
    }
    state = {
        spec.name: np.zeros(spec.shape, spec.dtype)
        for spec in signatures(profile)["generator"].state
    }
    generator = engines["generator"]
    generator.reset()
    if first.text is not None:
        spec = signatures(profile)["prompt"].spec("text")
        text = np.asarray(first.text, spec.dtype).reshape(spec.shape)
        wanted = _reference(bundle, "prompt", {"text": text})
        generator.reset(**engines["prompt"].run(text=text))
        for kind in ("k", "v"):
            for name, cache in zip(
                layer_names(f"text_{kind}", profile),
                layer_names(f"{kind}_cache", profile),
                strict=True,
            ):
                state[cache][:, : profile.text.tokens] = wanted[name]
    rng = np.random.default_rng(0)
    inputs = {
        spec.name: rng.standard_normal(spec.shape).astype(spec.dtype)
        for spec in signatures(profile)["generator"].inputs
        if spec.name != "cache_len"
    }
    inputs |= {"previous": latent, "time": np.ones(1, np.float32)}
    clean = _reference(
        bundle,
        "generator",
        inputs | state | {"cache_len": np.array([profile.text.tokens], np.int32)},
    )["clean"]
    figures["generator"] = _error(generator.run(block=0, **inputs)["clean"], clean)
    memory = {
        spec.name: np.zeros(spec.shape, spec.dtype) for spec in signatures(profile)["decoder"].state
    }
    frames = _reference(bundle, "decoder", {"latent": clean, **memory})["frames"]
    engines["decoder"].reset()
    found = engines["decoder"].run(latent=clean)["frames"].astype(np.float64)
    figures["psnr_db"] = round(psnr_db(np.square(found - frames).mean()), 2)
    bad = [
        f"{name} differs by {figures[name]:.3f}"
        for name in ("encoder", "generator")
        if not figures[name] <= limits.latent_error
    ]
    bad += (
        [f"frames have {figures['psnr_db']} dB"] if not figures["psnr_db"] >= limits.psnr_db else []
    )
    if bad:
        raise ParityError(
            f"the plans disagree with the exported graphs: {', '.join(bad)} (limits: {limits.latent_error}, {limits.psnr_db} dB)",
            "build with --attention native, or a higher precision, to see which part is to blame; the bundle was not changed",
        )
    return figures


def _reference(bundle: Bundle, graph: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One run of an exported graph in ONNX Runtime on the CPU; only one graph's weights are in memory at a time."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        bundle.checked(f"{graph}.onnx"), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))


def _error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Size of the difference over the reference's own; infinite where a number is none."""
    difference = np.linalg.norm(found.astype(np.float64) - wanted) / max(
        float(np.linalg.norm(wanted)), 1e-9
    )
    return round(float(difference), 5) if np.isfinite(difference) else float("inf")
