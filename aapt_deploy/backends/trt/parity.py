"""Compare the plans of an engine with their exported graphs, on the same inputs.

The reference is ONNX Runtime on the CPU with the exported graphs, FP8 quantisation included. So
a difference comes from TensorRT or our kernels, not from the precision; `aapt quality` measures
that. Only one graph's weights are in memory at a time.
"""

from typing import Any

import numpy as np

from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.bundle.signature import GraphSignature, TensorSpec, text_pairs
from aapt_deploy.errors import ParityError
from aapt_deploy.models.family import family_of
from aapt_deploy.rollout.engine import Engines
from aapt_deploy.rollout.starts import Start, all_starts
from aapt_deploy.video.metrics import psnr_db


def start_of(bundle: Bundle) -> Start:
    """Return a start of the bundle, with random embeddings for an external encoder's prompt."""
    first = all_starts(bundle)[0]
    if bundle.profile.text.kind != "embedding" or not bundle.profile.text.tokens:
        return first
    shape = family_of(bundle.profile).signatures(bundle.profile)["prompt"].spec("text").shape
    return first._replace(text=np.random.default_rng(0).standard_normal(shape, np.float32))


def compare(engines: Engines, bundle: Bundle, first: Start) -> dict[str, Any]:
    """Run one pass of every graph, and the same in ONNX Runtime; return relative errors.

    Raises ParityError above the profile's `quality.latent_error`, or under `quality.psnr_db`.
    """
    profile, limits, graphs = (
        bundle.profile,
        bundle.profile.quality,
        family_of(bundle.profile).signatures(bundle.profile),
    )
    figures: dict[str, Any] = {}
    rng = np.random.default_rng(0)
    given = {spec.name: _drawn(spec, rng) for spec in graphs["generator"].inputs}
    if first.image is not None:
        latent = _reference(bundle, "encoder", {"image": first.image})["latent"]
        figures["encoder"] = _error(engines["encoder"].run(image=first.image)["latent"], latent)
        given |= {"previous": latent} if "previous" in given else {}
    state = _zeros(graphs["generator"])
    generator = engines["generator"]
    generator.reset()
    if first.text is not None:
        spec = graphs["prompt"].spec("text")
        text = np.asarray(first.text, spec.dtype).reshape(spec.shape)
        wanted = _reference(bundle, "prompt", {"text": text})
        generator.reset(**engines["prompt"].run(text=text))
        for owner, values in text_pairs(profile, wanted):
            state[owner][:, : values.shape[1]] = values
    given["time"] = np.ones(1, np.float32)
    length = {"cache_len": np.array([profile.cached_text_tokens], np.int32)}
    clean = _reference(bundle, "generator", given | state | length)["clean"]
    del given["cache_len"]
    figures["generator"] = _error(generator.run(block=0, **given)["clean"], clean)
    memory, one = _zeros(graphs["decoder"]), clean[:1]
    frames = _reference(bundle, "decoder", {"latent": one, **memory})["frames"]
    engines["decoder"].reset()
    found = engines["decoder"].run(latent=one)["frames"].astype(np.float64)
    psnr = figures["psnr_db"] = round(psnr_db(np.square(found - frames).mean()), 2)
    errors = [(name, error) for name, error in figures.items() if name != "psnr_db"]
    large = [(name, error) for name, error in errors if not error <= limits.latent_error]
    bad = [f"{name} differs by {error:.3f}" for name, error in large]
    if not psnr >= limits.psnr_db:
        bad.append(f"frames have {psnr} dB")
    if bad:
        allowed = f"limits: {limits.latent_error}, {limits.psnr_db} dB"
        raise ParityError(
            f"the plans disagree with the exported graphs: {', '.join(bad)} ({allowed})",
            "build with --attention native, or a higher precision, to see which part is to blame; "
            "the bundle was not changed",
        )
    return figures


def _zeros(signature: GraphSignature) -> dict[str, np.ndarray]:
    """Return a graph's state at the beginning."""
    specs = (*signature.state, *signature.conditioning)
    return {spec.name: np.zeros(spec.shape, spec.dtype) for spec in specs}


def _drawn(spec: TensorSpec, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(spec.shape).astype(spec.dtype)


def _reference(bundle: Bundle, graph: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run an exported graph once in ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    path, providers = bundle.checked(f"{graph}.onnx"), ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))


def _error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the difference's norm over the reference's; infinite if any number is NaN."""
    size = max(float(np.linalg.norm(wanted)), 1e-9)
    difference = np.linalg.norm(found.astype(np.float64) - wanted) / size
    return round(float(difference), 5) if np.isfinite(difference) else float("inf")
