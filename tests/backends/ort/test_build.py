"""build-engine: what is built, how it is chosen, and what is refused.

A build that dies leaves the bundle as it was.
"""

import dataclasses
import math
import shutil
import signal
import subprocess
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from aapt_deploy import assets
from aapt_deploy.backends import cpu, trial
from aapt_deploy.backends.build import build_engine
from aapt_deploy.backends.ort import build
from aapt_deploy.backends.ort.engine import OrtEngine, Threads, open_session
from aapt_deploy.backends.trial import BuildOptions
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.errors import BundleError, BusyError, MachineError, UsageError
from aapt_deploy.export import export
from aapt_deploy.models import checkpoint
from aapt_deploy.models.aapt.graphs import DecoderGraph
from aapt_deploy.models.aapt.signature import signatures
from aapt_deploy.models.aapt.vae import from_pixels
from aapt_deploy.ops.block_causal_attention import DOMAIN
from aapt_deploy.profiles import Profile, Target
from aapt_deploy.rollout.engine import TappedEngine
from aapt_deploy.rollout.starts import all_starts
from tests.support.bundles import rewrite_manifest, tree
from tests.support.commands import COMMAND, ENVIRONMENT
from tests.support.opening import open_engines, silent
from tests.support.tiny import Made


def graph(opened: Bundle, key: str, name: str) -> onnx.ModelProto:
    return onnx.load(opened.checked(opened.engines[key]["graphs"][name]))


# --- what is built ---


def test_engines_are_measured_and_recorded(made: Made) -> None:
    opened = Bundle.open(made.path)
    assert [engine.key for engine in made.built] == [
        "onnxruntime-fp32",
        "onnxruntime-int8",
        "torch-fp32",
    ]
    for engine in made.built:
        entry = opened.engines[engine.key]
        assert asdict(engine).items() <= entry.items()
        assert engine.key == f"{entry['backend']}-{entry['precision']}"
        assert 0 < engine.step_ms < 5000
        assert (engine.threads, engine.spinning) == (1, False)
    fp32, int8, torch = made.built
    assert fp32.psnr_db is None is torch.psnr_db
    assert int8.psnr_db is not None
    assert 30 < int8.psnr_db < 70  # 24 where products of these weights overflow
    assert "weight_bits" not in opened.engines[fp32.key]
    assert int8.bytes < fp32.bytes
    assert torch.bytes == 0
    files = opened.manifest["files"]
    assert fp32.bytes == sum(
        entry["bytes"]
        for name, entry in files.items()
        if name.startswith("engines/onnxruntime-fp32/")
    )


def test_graphs_are_lowered_to_what_onnx_runtime_runs_best(bundle: Path, tiny: Profile) -> None:
    opened = Bundle.open(bundle)
    kinds = {
        key: [node.op_type for node in graph(opened, key, "generator").graph.node]
        for key in ("onnxruntime-fp32", "onnxruntime-int8")
    }
    for key, operators in kinds.items():
        assert operators.count("TensorScatter") == 2 * tiny.model.depth, key
        assert operators.count("Attention") == tiny.model.depth, key
        assert not [f for f in graph(opened, key, "generator").functions if f.domain == DOMAIN]
    assert "MatMulInteger" in kinds["onnxruntime-int8"]
    assert "MatMulInteger" not in kinds["onnxruntime-fp32"]
    decoder = graph(opened, "onnxruntime-int8", "decoder")
    types = {w.name: w.data_type for w in decoder.graph.initializer}
    quantised = [w for w, kind in types.items() if kind == onnx.TensorProto.INT8]
    assert len(quantised) >= len(tiny.vae.decoder_channels)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in decoder.graph.node}
    assert types["vae.decoder.linear.conv.weight"] == onnx.TensorProto.FLOAT  # it makes the picture


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize(("exact", "largest", "bits"), [(True, 127, 8), (False, 64, 7)])
def test_a_cpu_that_would_overflow_gets_weights_of_seven_bits(
    exact: bool, largest: int, bits: int, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uint8 times int8, twice, does not fit into 16 bits; without VNNI an x86 cuts such sums off.

    The manifest says which weights an engine has.
    """
    monkeypatch.setattr(build, "adds_int8_exactly", lambda: exact)
    build_engine(Bundle.open(copied), "onnxruntime", "int8", BuildOptions(silent))
    opened = Bundle.open(copied)
    assert opened.engines["onnxruntime-int8"]["weight_bits"] == bits
    for name in ("generator", "decoder"):
        tensors = graph(opened, "onnxruntime-int8", name).graph.initializer
        weights = [
            onnx.numpy_helper.to_array(w)
            for w in tensors
            if w.data_type == onnx.TensorProto.INT8 and len(w.dims) > 1
        ]
        assert weights and max(int(np.abs(w.astype(int)).max()) for w in weights) == largest


@pytest.mark.parametrize(
    ("kind", "flags", "exact"),
    [
        ("x86_64", "avx2 fma", False),
        ("x86_64", "avx2 avx_vnni", True),
        ("AMD64", "avx512_vnni", True),
        ("aarch64", "", True),
    ],
)
def test_which_cpus_overflow(
    kind: str, flags: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu.platform, "machine", lambda: kind)
    monkeypatch.setattr(
        Path, "read_text", lambda path: f"model name\t: some\nflags\t\t: fpu {flags}\n"
    )
    assert cpu.adds_int8_exactly() is exact


def test_nothing_of_the_way_to_an_engine_stays_in_it(bundle: Path) -> None:
    for key in ("onnxruntime-fp32", "onnxruntime-int8"):
        assert tree(bundle / "engines" / key) == {
            "1",
            *(f"1/{name}.onnx" for name in ("encoder", "prompt", "generator", "decoder")),
        }


def test_the_calibrator_saw_the_decoder_at_work(bundle: Path, tiny: Profile) -> None:
    """Every start frame, the start image and some blocks each.

    Each comes with the memory that the decoder had at that moment.
    """
    opened = Bundle.open(bundle)
    samples = list(build._decoder_inputs(opened, all_starts(opened), silent))
    assert len(samples) == 2 * (1 + build.CALIBRATION_BLOCKS)
    first, second = samples[0], samples[1]
    assert all(not first[name].any() for name in first if name.startswith("memory"))
    assert any(second[name].any() for name in second if name.startswith("memory"))
    assert not np.array_equal(samples[1]["latent"], samples[2]["latent"])
    reader = build.Samples(samples[:1])
    assert reader.get_next() is samples[0]
    assert reader.get_next() is None


DARK = 0.15  # of the light of a start frame
SHOWN = 3  # times each latent is decoded: the decoder remembers one


def test_int8_keeps_pictures_that_are_darker_than_every_start_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedded checkpoint's decoder, for the middle of the picture.

    Calibration sees the start frames alone. With the linear path in int8, too, nothing comes out
    darker than they are.
    """
    held = checkpoint.load(assets.CHECKPOINT)
    profile = held.profile.replace(
        video=dataclasses.replace(held.profile.video, width=96, height=48)
    )
    path, signature, module = (
        tmp_path / "fp32.onnx",
        signatures(profile)["decoder"],
        DecoderGraph(held.vae).eval(),
    )
    export._write(
        export.to_onnx(module, signature, profile), path, module, export.Weights(held, None)
    )
    with torch.inference_mode():
        pictures = [frame.image[32:80, 48:144] for frame in held.start_frames.values()]
        bright, dark = (
            [held.vae.encode(from_pixels(p * light)[None, None])[:, 0].numpy() for p in pictures]
            for light in (1, DARK)
        )
    exact = OrtEngine(open_session(path, Threads(1, False)), signature)
    seen: list[dict[str, np.ndarray]] = []
    tap = partial(build._record, exact, seen)
    shown(TappedEngine("decoder", exact, tap), bright)
    wanted = shown(exact, dark)

    def worst_db(file: str) -> float:
        int8 = Path(shutil.copy(path, tmp_path / file))
        build._quantise_decoder(int8, seen)
        made = shown(OrtEngine(open_session(int8, Threads(1, False)), signature), dark)
        return float(
            (10 * np.log10(255**2 / np.square(made - wanted).mean(axis=(1, 2, 3, 4)))).min()
        )

    assert worst_db("as-built.onnx") > 50
    monkeypatch.setattr(build, "LINEAR_PATH", "the name of no weight")
    assert worst_db("all-int8.onnx") < 30, (
        "these pictures show nothing of the loss that the linear path is kept in float for"
    )


def shown(decoder: Any, latents: list[np.ndarray]) -> np.ndarray:
    """What the decoder makes of each latent once its memory is full of it: [n, 4, H, W, 3]."""
    made = []
    for latent in latents:
        decoder.reset()
        made.append([decoder.run(latent=latent)["frames"].astype(float) for _ in range(SHOWN)][-1])
    return np.stack(made)


def test_psnr_is_that_of_the_frames(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    begin = all_starts(opened)[0]
    fp32, int8 = (open_engines(opened, "onnxruntime", precision) for precision in ("fp32", "int8"))
    pairs = [frames(engines, opened) for engines in (fp32, int8)]
    error = np.mean([np.square(a.astype(float) - b).mean() for a, b in zip(*pairs, strict=True)])
    assert math.isclose(
        trial.psnr_db(fp32, int8, opened.profile, begin),
        10 * math.log10(255**2 / error),
        abs_tol=1e-6,
    )
    assert (
        trial.psnr_db(fp32, open_engines(opened, "onnxruntime", "fp32"), opened.profile, begin)
        > 100
    )


def frames(engines: Any, opened: Bundle) -> list[np.ndarray]:
    source = trial.left_and_right(engines, opened.profile, all_starts(opened)[0])
    next(source)
    return [next(source) for _ in range(trial.QUALITY_BLOCKS)]


def test_the_fastest_threads_win(
    bundle: Path, tiny: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Timing is replaced: which setting is fast depends on the machine.

    That the fastest is taken is ours to check.
    """
    tried: list[Threads] = []

    class Counted:
        def __init__(
            self, profile: Profile, graphs: dict[str, Path], threads: Threads, precision: str
        ) -> None:
            tried.append(threads)

        def close(self) -> None:
            pass

    speeds = {
        Threads(1, False): 9.0,
        Threads(2, False): 7.0,
        Threads(2, True): 3.0,
        Threads(8, False): 4.0,
        Threads(8, True): 5.0,
    }
    monkeypatch.setattr(build, "OrtEngines", Counted)
    monkeypatch.setattr(build, "cores", lambda: 8)
    monkeypatch.setattr(build, "median_step_ms", lambda engines, profile, start: speeds[tried[-1]])
    said: list[str] = []
    best = build._tune(tiny, {}, "fp32", all_starts(Bundle.open(bundle))[0], said.append)
    assert best == (Threads(2, True), 3.0)
    assert set(tried) == set(speeds)
    assert "2 threads, spinning: 3.0 ms a step" in said


# --- what is chosen, and what is refused ---


@pytest.mark.usefixtures("one_core")
def test_int8_alone_brings_the_fp32_that_it_is_compared_with(bare: Path) -> None:
    opened = Bundle.open(bare)
    assert [
        engine.key for engine in build_engine(opened, "onnxruntime", "int8", BuildOptions(silent))
    ] == ["onnxruntime-fp32", "onnxruntime-int8"]
    assert [
        engine.key for engine in build_engine(opened, "onnxruntime", "int8", BuildOptions(silent))
    ] == ["onnxruntime-int8"]
    again = Bundle.open(bare)
    again.verify()
    assert set(again.engines) == {"onnxruntime-fp32", "onnxruntime-int8"}
    assert tree(bare / "engines" / "onnxruntime-int8") >= {"2/decoder.onnx"}


@pytest.mark.usefixtures("one_core")
def test_a_bundle_without_start_frames_is_built_all_the_same(bare: Path) -> None:
    rewrite_manifest(bare, lambda manifest: manifest.update(start_frames={}))
    opened = Bundle.open(bare)
    build_engine(opened, "onnxruntime", "int8", BuildOptions(silent))
    opened.verify()
    assert len(frames(open_engines(opened, "onnxruntime", "int8"), opened)) == trial.QUALITY_BLOCKS


@pytest.mark.parametrize(
    ("backend", "precision", "message"),
    [
        ("tensorflow", None, "backend 'tensorflow' cannot be built"),
        ("onnxruntime", "fp8", "graphs in fp32; onnxruntime builds fp32 and int8"),
        ("torch", "int8", "precision 'int8' does not exist for torch"),
        ("", None, "backend '' cannot be built"),
    ],
)  # fmt: skip
def test_unknown_names_are_refused_with_the_known_ones(
    bundle: Path, backend: str, precision: str | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        build_engine(Bundle.open(bundle), backend, precision, BuildOptions(silent))
    assert caught.value.exit_code == 2
    assert any(word in caught.value.hint for word in ("onnxruntime", "fp32", "--precision fp8"))


def test_a_profile_for_a_gpu_is_refused(bundle: Path, tiny: Profile) -> None:
    opened = Bundle.open(bundle)
    opened.__dict__["profile"] = tiny.replace(target=Target("cuda", "H100", 90, 80))
    with pytest.raises(
        MachineError, match="profile tiny-cpu is for H100; onnxruntime runs on the CPU only"
    ) as caught:
        build_engine(opened, "onnxruntime", None, BuildOptions(silent))
    assert caught.value.exit_code == 5
    assert caught.value.hint


def test_a_damaged_graph_is_found_before_it_is_lowered(bare: Path) -> None:
    content = bytearray((bare / "generator.onnx").read_bytes())
    content[-50] ^= 1
    (bare / "generator.onnx").write_bytes(content)
    before = tree(bare)
    with pytest.raises(BundleError, match=r"generator\.onnx does not match the manifest") as caught:
        build_engine(Bundle.open(bare), "onnxruntime", None, BuildOptions(silent))
    assert "aapt export" in caught.value.hint
    assert tree(bare) - {".lock"} == before - {".lock"}


def test_two_builds_at_once_are_one_too_many(bare: Path) -> None:
    with (
        Bundle.open(bare).add_engine("somebody-elses"),
        pytest.raises(BusyError, match="is being written by process"),
    ):
        build_engine(Bundle.open(bare), "onnxruntime", "fp32", BuildOptions(silent))


# --- builds that die ---


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize(
    "where",
    ["median_step_ms", "_quantise_linears", "_quantise_decoder", "mean_psnr_db", "save_model"],
)
@pytest.mark.parametrize(
    "error", [RuntimeError("crash"), KeyboardInterrupt()], ids=["crash", "ctrl-c"]
)
def test_a_build_that_breaks_off_leaves_the_engines_that_were(
    bundle: Path, copied: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    before, opened = tree(copied), Bundle.open(copied)
    monkeypatch.setattr(build, where, fail)
    with pytest.raises(type(error)):
        build_engine(opened, "onnxruntime", "int8", BuildOptions(silent))
    assert tree(copied) == before
    again = Bundle.open(copied)
    again.verify()
    assert again.manifest == Bundle.open(bundle).manifest


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_a_stopped_build_leaves_a_valid_bundle(
    copied: Path, number: signal.Signals, code: int
) -> None:
    before = Bundle.open(copied).manifest
    with subprocess.Popen(
        [*COMMAND, "build-engine", str(copied)], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stderr is not None
        said = [next(line for line in process.stderr if "lowering" in line)]
        time.sleep(0.05)
        process.send_signal(number)
        if (
            number == signal.SIGTERM
        ):  # `timeout` sends two; the second must not break off the cleaning up
            process.send_signal(number)
        said += process.stderr.read().splitlines()
    assert process.returncode == code
    assert not [line for line in said if "Traceback" in line or "Error" in line]
    again = Bundle.open(copied)
    again.verify()
    assert again.manifest == before
    if number != signal.SIGKILL:
        assert not list(copied.glob(".stage-*"))
    with again.add_engine("next"):
        pass
    assert not list(copied.glob(".stage-*"))
