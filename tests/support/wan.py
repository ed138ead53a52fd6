"""The Wan family's reference rollouts, and how they are run through our networks.

A case is a rollout of the authors' own code on tiny random weights (tests/fixtures/wan/README.md).
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from safetensors.torch import load_file
from torch import Tensor

from aapt_deploy import profiles
from aapt_deploy.backends.ort.engine import OrtGenerator, Threads, open_session
from aapt_deploy.backends.ort.lower import lower_in_place
from aapt_deploy.backends.torch_eager import EagerEngines
from aapt_deploy.bundle.graph_file import load_model, save_model
from aapt_deploy.export import export
from aapt_deploy.export.import_ import Request, import_checkpoint
from aapt_deploy.models.checkpoint import Checkpoint, Stored, stored
from aapt_deploy.models.family import family_of
from aapt_deploy.models.wan import keys
from aapt_deploy.models.wan.generator import Generator
from aapt_deploy.ops.block_causal_attention import Ring
from aapt_deploy.profiles import Profile, Sampler, Video, Window
from aapt_deploy.rollout.engine import Engine, Engines, Tapped
from aapt_deploy.rollout.loop import Rollout, Steering
from tests.support import ROOT

FOLDER = ROOT / "tests" / "fixtures" / "wan"
TOLERANCE = 2e-5  # float32 against float32; float64 of the authors' own code is 2e-6 away


class Case(NamedTuple):
    """One reference rollout."""

    name: str
    info: dict[str, Any]
    tensors: dict[str, Tensor]
    profile: Profile


def weights(name: str, folder: Path = FOLDER) -> dict[str, Tensor]:
    return {key: value.float() for key, value in load_file(folder / f"{name}.safetensors").items()}


def case(name: str, folder: Path = FOLDER) -> Case:
    info = json.loads((folder / f"{name}.json").read_text())
    tensors = {k: v.float() for k, v in load_file(folder / f"{name}.safetensors").items()}
    return Case(name, info, tensors, profile_of(info))


def profile_of(info: dict[str, Any]) -> Profile:
    """The tiny preset in the shape of a reference rollout."""
    tiny, config, (_, height, width) = profiles.load("wan-tiny-cpu"), info["config"], info["latent"]
    n, window = info["block_frames"], info["local_attn_size"]
    shares = lambda times: tuple(t / 1000 for t in times or ())
    first = sum(call["kind"] != "write" for call in info["calls"])  # all fit, if nothing is evicted
    sink = info["sink_size"] if window > 0 else 0
    past = window - sink - n if window > 0 else n * first
    return tiny.replace(
        model=dataclasses.replace(
            tiny.model, dim=config["dim"], ffn=config["ffn_dim"], heads=config["num_heads"],
            depth=config["num_layers"],
        ),
        text=dataclasses.replace(tiny.text, tokens=config["text_len"], dim=config["text_dim"]),
        video=Video(8 * width, 8 * height, 16, 16, block_frames=n),
        window=Window(past, sink, sink_follows="infinity" in info["case"]),
        sampler=Sampler(
            shares(info["timesteps"]), kind="renoise", write=True,
            first_block=shares(info["first_block_timesteps"]),
        ),
        vae=dataclasses.replace(tiny.vae, encoder_channels=()) if n > 1 else tiny.vae,
    )  # fmt: skip


def loaded(module: torch.nn.Module, sources: keys.Sources, theirs: dict[str, Tensor]) -> None:
    """Fill a network from tensors under their published names."""
    made = {
        ours: source.make(*(theirs[n] for n in source.theirs)) for ours, source in sources.items()
    }
    module.load_state_dict(made)


def generator(case: Case, folder: Path = FOLDER) -> Generator:
    made = Generator(case.profile).eval()
    theirs = weights(f"weights-{case.info['weights']}", folder)
    loaded(made, keys.generator_sources(case.profile), theirs)
    return made


class Recorded:
    """A rollout's noise as the authors' code drew it. Stands for `Noise` and for its generator."""

    def __init__(self, case: Case) -> None:
        self.case, self.rng = case, self
        denoise = [call for call in case.info["calls"] if call["kind"] == "denoise"]
        calls = {call["block"]: call["start_frame"] for call in denoise}
        before, n = case.info["initial_frames"], case.profile.video.block_frames
        noise = case.tensors["noise"][0]
        self.blocks = iter([noise[at - before :][:n] for at in calls.values()])
        names = (f"renoise.{call['block']}.{call['index']}" for call in denoise)
        self.later = iter([case.tensors[name][0] for name in names if name in case.tensors])

    def next(self) -> np.ndarray:
        return next(self.blocks).numpy()

    def standard_normal(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        drawn = next(self.later).numpy()
        assert drawn.shape == shape and drawn.dtype == dtype
        return drawn


class Compared(NamedTuple):
    """The largest differences from the reference over a rollout."""

    latents: float
    flows: float  # of the passes with noise


def compare(case: Case, engines: Engines) -> Compared:
    """Run our rollout, on its own output, with the reference's noise and text."""
    calls = [call for call in case.info["calls"] if call["kind"] == "denoise"]
    expected, worst = iter(f"flow.{c['block']}.{c['index']}" for c in calls), Worst()

    def tap(graph: str, method: str, call: Callable[..., Any], given: dict[str, Any]) -> Any:
        result = call(**given)
        if (graph, method) == ("generator", "run") and given["time"][0] > 0:
            flow = (given["noisy"] - result["clean"]) / given["time"][0]
            if (name := next(expected)) in case.tensors:  # only in the complete set
                worst.see(flow, case.tensors[name][0])
        return result

    stream = Rollout(Tapped(engines, tap), case.profile, None, 0)
    stream.noise = Recorded(case)  # type: ignore[assignment]
    if case.info["initial_frames"]:
        stream.first = case.tensors["initial"][0].numpy()
    latents, n = Worst(), case.profile.video.block_frames
    for block in range(len(case.tensors["latents"][0]) // n):
        switched = case.info["switch_block"] is not None and block >= case.info["switch_block"]
        text = case.tensors["text.2" if switched else "text"].numpy()
        made = stream.latent(Steering(family_of(case.profile).cruise, text))
        latents.see(made, case.tensors["latents"][0, block * n :][:n])
    assert next(expected, None) is None
    return Compared(latents.most, worst.most)


class Worst:
    """The largest difference seen."""

    most = 0.0

    def see(self, ours: np.ndarray, theirs: Tensor) -> None:
        self.most = max(self.most, float(np.abs(ours - theirs.numpy()).max()))


def eager(case: Case, folder: Path = FOLDER) -> EagerEngines:
    _, vae = family_of(case.profile).networks().build(case.profile)
    made = generator(case, folder)
    return EagerEngines(Checkpoint(case.profile, "", Path(), {}, made, vae), 1, "fp32")


def imported(profile: Profile | str, out: Path, folder: Path = FOLDER) -> Stored:
    """Import the fixtures' generator and VAE as published files."""
    profile = profiles.load(profile) if isinstance(profile, str) else profile
    option, name = ("--vae", "vae") if profile.vae.kind == "wan" else ("--taehv", "taehv")
    file = lambda of: folder / f"weights-{of}.safetensors"
    files = {"": file("tiny"), option: file(f"{name}-tiny")}
    import_checkpoint(Request(files), profile, out, False, lambda text: None)
    return stored(out)


def exported(stored: Stored, graph: str, folder: Path) -> onnx.ModelProto:
    """Export one graph with its weights."""
    profile = stored.profile
    module = export.hollow_graphs(profile, None)[graph]
    model = export.to_onnx(module, family_of(profile).signatures(profile)[graph], profile)
    path = folder / f"{graph}-exported.onnx"
    export._write(model, path, module, export.Weights(stored, None))
    return load_model(path)


class InPlace:
    """Engines whose generator is ONNX Runtime's, in place; the others are PyTorch's."""

    backend, precision, overlapped = "onnxruntime", "fp32", False

    def __init__(self, case: Case, folder: Path) -> None:
        stored = imported(case.profile, folder / "case.safetensors")
        ring = Ring.of(case.profile, in_place=True)
        lowered = lower_in_place(exported(stored, "generator", folder), ring)
        save_model(lowered, folder / "generator.onnx")
        session = open_session(folder / "generator.onnx", Threads(1, False))
        self.generator, self.others = OrtGenerator(session, case.profile), eager(case)

    def __getitem__(self, graph: str) -> Engine:
        return self.generator if graph == "generator" else self.others[graph]
