"""The Wan family in ONNX Runtime and in eager PyTorch: rollouts, streams, forks, int8."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aapt_deploy import profiles
from aapt_deploy.backends import table
from aapt_deploy.backends.ort.engine import OrtEngine, Threads, open_session
from aapt_deploy.backends.table import open_engines
from aapt_deploy.backends.torch_eager import EagerEngines
from aapt_deploy.backends.trial import left_and_right, mean_psnr_db
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.bundle.graph_file import save_model
from aapt_deploy.errors import MachineError
from aapt_deploy.export.calibrate import calibrate
from aapt_deploy.measure.quality import Twins
from aapt_deploy.models import checkpoint, fp8
from aapt_deploy.models.family import family_of
from aapt_deploy.rollout import loop
from aapt_deploy.rollout.engine import Engines, Tapped
from aapt_deploy.rollout.loop import Rollout, Steering, rollout
from aapt_deploy.rollout.starts import all_starts, coarse_start
from tests.support import wan
from tests.support.tiny import picture


@pytest.mark.parametrize(
    "name", ["sf-chunk3-window9-sink3", "cf-frame-1step-i2v", "ll-infinity-window9-sink3"]
)
def test_a_rollout_in_place_is_the_authors_own(name: str, tmp_path: Path) -> None:
    case = wan.case(name)
    assert wan.compare(case, wan.InPlace(case, tmp_path)).latents < wan.TOLERANCE


@pytest.mark.parametrize("kind", ["wan", "taehv"])
def test_a_decoder_streams_as_pytorch_does_with_its_memories(kind: str, tmp_path: Path) -> None:
    tiny = profiles.load("wan-tiny-cpu")
    profile = tiny.replace(video=dataclasses.replace(tiny.video, width=48, height=32))
    if kind == "taehv":
        channels = (8, 8, 8, 8), (16, 12, 8, 8)
        profile = profile.replace(vae=profiles.Vae(*channels, 3, 2, kind="taehv"))
    stored = wan.imported(profile, tmp_path / "x.safetensors")
    save_model(wan.exported(stored, "decoder", tmp_path), tmp_path / "decoder.onnx")
    signature = family_of(profile).signatures(profile)["decoder"]
    decoder = OrtEngine(open_session(tmp_path / "decoder.onnx", Threads(1, False)), signature)
    loaded = checkpoint.load(stored.path)
    found = wan.weights(f"{'vae' if kind == 'wan' else 'taehv'}-tiny")
    wanted = found["frames"][0] / 2 + 0.5 if kind == "wan" else found["frames"][0]
    pixels = (wanted.clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    state, at = [torch.zeros(spec.shape) for spec in signature.state], 0
    for latent in found["latents"][0][:, None]:
        frames = decoder.run(latent=latent.numpy())["frames"][-(4 if at else 1) :]
        assert np.abs(frames - pixels[at : at + len(frames)]).max() <= 0.51
        at += len(frames)
        with torch.no_grad():
            _, state = loaded.vae.decode(latent, state)
        for ours, theirs in zip(decoder.memory.values(), state, strict=True):
            # Both are float32: 4 channels of one pixel, normalised, may be near zero together.
            largest = max(1.0, float(theirs.abs().max()))
            assert np.abs(ours - theirs.numpy()).max() < wan.TOLERANCE * largest
    decoder.reset()
    again = decoder.run(latent=found["latents"][0, :1].numpy())["frames"][-1:]
    assert np.abs(again - pixels[:1]).max() <= 0.51


def frames_of(
    bundle: Bundle, engines: Engines, image: np.ndarray | None, blocks: int
) -> np.ndarray:
    family, rng = family_of(bundle.profile), np.random.default_rng(2)
    texts = [family.random_text(bundle.profile, rng) for _ in range(2)]
    steer = lambda block: Steering(family.cruise, texts[block // 4 % 2])
    frames = rollout(engines, bundle.profile, image, steer, seed=3)
    return np.concatenate(list(itertools.islice(frames, blocks)))


@pytest.mark.parametrize("from_picture", [False, True])
def test_both_engines_show_the_same_frames_while_the_ring_wraps(
    wan_bundle: Path, from_picture: bool
) -> None:
    bundle = Bundle.open(wan_bundle)
    image = picture(96, 64, 1) if from_picture else None
    opened = [open_engines(bundle, name, "fp32", print) for name in ("onnxruntime", "torch")]
    ours, theirs = (frames_of(bundle, engines, image, 9) for engines in opened)
    assert ours.shape == (1 + 8 * 4, 64, 96, 3)
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    if from_picture:  # the first frame is the picture, as it decodes
        with torch.no_grad():
            vae = checkpoint.load(bundle.checked(bundle.CHECKPOINT)).vae
            latent = vae.encode(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
            signature = family_of(bundle.profile).signatures(bundle.profile)["decoder"]
            state = [torch.zeros(spec.shape) for spec in signature.state]
            shown = vae.decode(latent, state)[0][-1].clamp(0, 1) * 255
        assert np.abs(ours[0] - shown.permute(1, 2, 0).numpy()).max() <= 0.51


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_a_fork_continues_bit_for_bit(wan_bundle: Path, backend: str) -> None:
    bundle = Bundle.open(wan_bundle)
    engines, family = open_engines(bundle, backend, "fp32", print), family_of(bundle.profile)
    text = family.random_text(bundle.profile, np.random.default_rng(0))
    steering = Steering(family.cruise, text)
    stream = Rollout(engines, bundle.profile, None, 1)
    for _ in range(6):
        stream.step(steering)
    state = stream.state()
    wanted = [stream.step(steering) for _ in range(3)]
    other = Rollout(engines.fork(), bundle.profile, None, 2)
    other.restore(state)
    assert all(np.array_equal(other.step(steering), frames) for frames in wanted)


def test_int8_is_near_fp32(wan_bundle: Path) -> None:
    bundle = Bundle.open(wan_bundle)
    pair = [open_engines(bundle, "onnxruntime", name, print) for name in ("fp32", "int8")]
    psnr = mean_psnr_db(pair[0], pair[1], bundle.profile, all_starts(bundle))
    assert psnr > 20 and psnr == pytest.approx(bundle.engines["onnxruntime-int8"]["psnr_db"], abs=1)


def test_a_backend_without_cross_attention_refuses_the_family(wan_bundle: Path) -> None:
    bundle = Bundle.open(wan_bundle)
    with pytest.raises(MachineError, match="backend torch-cuda does not run") as caught:
        table.refuse_unsupported(bundle.profile, "torch-cuda")
    assert caught.value.hint.endswith("runs on: onnxruntime, torch, tensorrt, tensorrt-rtx")
    with pytest.raises(MachineError, match="cross-attention"):
        open_engines(bundle, "torch-cuda", "bf16", print)


def test_fp8_products_are_exported_and_near_fp32(tmp_path: Path) -> None:
    """The middle one of three blocks; its four linear layers and two of cross-attention."""
    stored = wan.imported("wan-tiny-cpu", tmp_path / "x.safetensors")
    scales = calibrate(checkpoint.load(stored.path), lambda text: None)
    assert sorted(scales.linear) == [
        f"blocks.1.{name}" for name in ("out", "qkv", "text_out", "text_q", "w1", "w2")
    ]
    loaded, plain = (checkpoint.load(stored.path) for _ in range(2))
    fp8.apply(loaded.generator, scales)
    twins = Twins(EagerEngines(loaded, 1, "fp32"))
    engines = Tapped(EagerEngines(plain, 1, "fp32"), twins)
    begin = coarse_start(stored.profile)
    for _ in itertools.islice(left_and_right(engines, stored.profile, begin), 7):
        pass
    assert 1e-4 < np.mean(twins.errors) < 0.03


def replaying(wan_bundle: Path, backend: str) -> tuple[Rollout, list[np.ndarray]]:
    """A stream whose prompt changes are replayed, and two prompts."""
    bundle = Bundle.open(wan_bundle)
    profile = bundle.profile
    text = dataclasses.replace(profile.text, replay=True)
    family, rng = family_of(profile), np.random.default_rng(4)
    texts = [family.random_text(profile, rng) for _ in range(2)]
    engines = open_engines(bundle, backend, "fp32", print)
    return Rollout(engines, profile.replace(text=text), None, 5), texts


def test_a_replayed_prompt_is_as_if_it_had_been_there_from_the_start(
    wan_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While nothing has left the window. The second stream is given the first one's latents."""
    (one, texts), (other, _) = (replaying(wan_bundle, "onnxruntime") for _ in range(2))
    controls = one.family.cruise
    made = [one.latent(Steering(controls, texts[block // 3])).copy() for block in range(4)]
    plain = loop.sample

    def given(*arguments: Any) -> Any:
        found = plain(*arguments)  # which draws what the first stream drew
        return made[other.block] if other.block < 3 else found

    monkeypatch.setattr(loop, "sample", given)
    for _ in range(3):
        other.latent(Steering(controls, texts[1]))
    again = other.latent(Steering(controls, texts[1]))
    assert np.abs(again - made[3]).max() < 1e-5


def test_engines_agree_on_a_replay_after_the_ring_has_wrapped(wan_bundle: Path) -> None:
    streams = [replaying(wan_bundle, backend) for backend in ("onnxruntime", "torch")]
    latents = []
    for stream, texts in streams:
        steps = [Steering(stream.family.cruise, texts[block // 7 % 2]) for block in range(16)]
        latents.append([stream.latent(step).copy() for step in steps])
        assert stream.block == 16 and len(stream.past) == 5
    assert max(np.abs(a - b).max() for a, b in zip(*latents, strict=True)) < 1e-4
