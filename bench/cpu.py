"""Measure speed and memory of the whole path on a CPU (`make bench`).

Writes docs/measurements/cpu-<date>.json. What it claims, and how it knows:

    ratios       ONNX Runtime, torch eager and torch eager without a cache make the same blocks in
                 turn, in one process: a machine that slows down slows all of them down
    flat cost    one stream of 5000 blocks, resident memory at both ends; then its blocks from 5000
                 on in turn with blocks 1 to 100 of a new stream, because a machine's own speed
                 shifts by more over minutes than the effect
    commit       ONNX Runtime's own profile of the generator: time in TensorScatter (the commit)
                 against the whole run, with the cache bound in place and, as a control, with a
                 second buffer, which makes it copy
    start        wall clock of fresh processes: `aapt --help`, and `aapt stream` to its first
                 block; and what they imported
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from aapt_deploy import assets
from aapt_deploy.backends import build
from aapt_deploy.backends.ort.engine import OrtGenerator, Threads, open_session
from aapt_deploy.backends.table import open_engines
from aapt_deploy.backends.trial import BuildOptions
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.export import export
from aapt_deploy.measure.latency import measure_bundle
from aapt_deploy.measure.machine import machine
from aapt_deploy.models import checkpoint
from aapt_deploy.models.aapt.camera import CRUISE
from aapt_deploy.models.aapt.rope import temporal_rope
from aapt_deploy.models.aapt.signature import generator as generator_signature
from aapt_deploy.models.checkpoint import Checkpoint
from aapt_deploy.ops.block_causal_attention import NEXT
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.loop import Steering, rollout
from aapt_deploy.rollout.starts import all_starts

ROOT = Path(__file__).parent.parent
PAIRED_BLOCKS = 40
LONG_BLOCKS = 5000
AROUND = 50  # blocks on each side of a point in the long stream


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Uncached:
    """A step without a cache, in torch.

    The window's blocks are computed again with every pass, as one parallel call.
    """

    def __init__(self, loaded: Checkpoint) -> None:
        self.generator, self.profile = loaded.generator, loaded.profile
        n = 2 + self.profile.window.frames  # sink, window, the block itself
        latent = (
            1,
            n,
            self.profile.video.latent_channels,
            self.profile.latent_height,
            self.profile.latent_width,
        )
        self.inputs = [
            torch.randn(latent),
            torch.randn(latent),
            torch.randn(1, n, 6, *latent[3:]),
            torch.rand(1, n) * 0.9 + 0.1,
        ]
        self.text = torch.zeros(1, self.profile.text.tokens, dtype=torch.int64)
        self.rope = torch.from_numpy(temporal_rope(self.profile, np.arange(n)))[None]

    def block(self) -> None:
        with torch.inference_mode():
            for _ in self.profile.sampler.timesteps:
                self.generator(*self.inputs, self.text, self.rope)


def paired(bundle: Bundle, loaded: Checkpoint) -> dict[str, Any]:
    """Make the same blocks by three engines in turn.

    The decoder of the cached ones is part of a step.
    """
    start, steering = all_starts(bundle)[0], None
    names = [
        ("onnxruntime fp32", "onnxruntime", "fp32"),
        ("onnxruntime int8", "onnxruntime", "int8"),
        ("torch eager", "torch", "fp32"),
    ]
    streams: dict[str, Callable[[], object]] = {}
    for name, backend, precision in names:
        steering = Steering(CRUISE, start.text)
        frames = rollout(
            open_engines(bundle, backend, precision, say),
            bundle.profile,
            start.image,
            lambda block, s=steering: s,
            seed=0,
        )
        next(frames)
        for _ in range(2 + bundle.profile.window.frames):  # fill the window
            next(frames)
        streams[name] = lambda frames=frames: next(frames)
    uncached = Uncached(loaded)
    streams["torch eager, no cache, generator only"] = uncached.block
    samples: dict[str, list[float]] = {name: [] for name in streams}
    for index in range(PAIRED_BLOCKS):
        for name, step in streams.items():
            before = time.perf_counter()
            step()
            samples[name].append(1000 * (time.perf_counter() - before))
        if index % 10 == 9:
            say(f"side by side: {index + 1} of {PAIRED_BLOCKS} blocks")
    base = np.array(samples["onnxruntime fp32"])
    ratios = {name: round(float(np.median(np.array(ms) / base)), 3) for name, ms in samples.items()}
    medians = {name: round(float(np.median(ms)), 2) for name, ms in samples.items()}
    return {
        "median_ms": medians,
        "ratio_to_onnxruntime_fp32": ratios,
        "samples_ms": {k: [round(v, 3) for v in ms] for k, ms in samples.items()},
    }


def long_stream(bundle: Bundle) -> Iterator[np.ndarray]:
    """An endless stream with engines of its own, its first frame taken."""
    start = all_starts(bundle)[0]
    frames = rollout(
        open_engines(bundle, "onnxruntime", None, say),
        bundle.profile,
        start.image,
        lambda block: Steering(CRUISE, start.text),
        seed=0,
    )
    next(frames)
    return frames


def flat(bundle: Bundle, blocks: int) -> dict[str, Any]:
    """Step time and memory over one long stream."""
    frames, times, memory = long_stream(bundle), np.zeros(blocks), {}
    for block in range(blocks):
        before = time.perf_counter()
        next(frames)
        times[block] = 1000 * (time.perf_counter() - before)
        if block in (2 * AROUND, blocks - 1):
            memory[block] = round(resident_mb(), 2)
        if block % 500 == 499:
            say(
                f"long stream: {block + 1} of {blocks} blocks, "
                f"{times[block - 499 : block + 1].mean():.1f} ms a step, {resident_mb():.1f} MB"
            )
    growth = memory[blocks - 1] - memory[2 * AROUND]
    hundreds = [round(float(np.median(part)), 2) for part in np.array_split(times, blocks // 100)]
    pair, turns = (long_stream(bundle), frames), np.zeros((2 * AROUND, 2))
    for turn in turns:
        for i, stream in enumerate(pair):
            before = time.perf_counter()
            next(stream)
            turn[i] = 1000 * (time.perf_counter() - before)
    early, late = np.median(turns, axis=0)
    return {
        "blocks": blocks, "median_ms_around_50": round(early, 2),
        f"median_ms_around_{blocks}": round(late, 2), "ratio": round(late / early, 3),
        "resident_mb": memory, "growth_mb": round(growth, 2), "median_ms_per_100_blocks": hundreds,
    }  # fmt: skip


def commit(bundle: Bundle) -> dict[str, Any]:
    """Measure where a generator pass spends its time, by operator.

    With the cache in place and with a second buffer.
    """
    entry = bundle.engines["onnxruntime-fp32"]
    path = bundle.checked(entry["graphs"]["generator"])
    found: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        for name, alias in (("in place", True), ("second buffer", False)):
            session = open_session(
                path,
                Threads(int(entry["threads"]), bool(entry["spinning"])),
                Path(folder) / "trace",
            )
            generator = OrtGenerator(session, bundle.profile)
            copies = (
                {}
                if alias
                else {cache + NEXT: array.copy() for cache, array in generator.caches.items()}
            )
            for output, array in copies.items():
                import onnxruntime

                generator.binding.bind_ortvalue_output(
                    output, onnxruntime.OrtValue.ortvalue_from_numpy(array)
                )
            zeros = {
                s.name: np.zeros(s.shape, s.dtype)
                for s in generator_signature(bundle.profile).inputs
                if s.name != "cache_len"
            }
            for block in range(60):
                generator.run(**zeros, block=block)
            events = json.loads(Path(session.end_profiling()).read_text())
            spent: dict[str, float] = {}
            for event in events:
                if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                    operator = event["args"]["op_name"]
                    spent[operator] = spent.get(operator, 0.0) + event["dur"] / 1000 / 60
            total = sum(spent.values())
            longest = sorted(spent.items(), key=lambda item: -item[1])
            found[name] = {
                "pass_ms": round(total, 3), "scatter_ms": round(spent["TensorScatter"], 4),
                "scatter_share": round(spent["TensorScatter"] / total, 5),
                "operators_ms": {k: round(v, 4) for k, v in longest[:8]},
            }  # fmt: skip
    cache_mb = sum(a.nbytes for a in generator.caches.values()) / 2**20
    return {"cache_mb": round(cache_mb, 2), **found}


def start(bundle: Path) -> dict[str, Any]:
    """Wall clock of fresh processes."""
    python = sys.executable

    def best(command: list[str], runs: int) -> tuple[float, subprocess.CompletedProcess[bytes]]:
        times = []
        for _ in range(runs):
            before = time.perf_counter()
            done = subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
            times.append(time.perf_counter() - before)
        return min(times), done

    help_s, _ = best([python, "-m", "aapt_deploy", "--help"], 7)
    with TemporaryDirectory() as folder:
        command = [
            python,
            "-m",
            "aapt_deploy",
            "stream",
            str(bundle),
            "-o",
            f"{folder}/x.mp4",
            "--seconds",
            "0.2",
            "--json",
        ]
        whole_s, done = best(command, 5)
        said = "print([m for m in ('torch', 'onnx') if m in sys.modules])"
        start_main = "import sys\nfrom aapt_deploy.cli.commands import main"
        probe = f"{start_main}\ntry:\n    main()\nfinally:\n    {said}"
        imported = subprocess.run(
            [python, "-c", probe, *command[3:-1]],
            capture_output=True,
            check=True,
            cwd=ROOT,
            text=True,
        ).stdout
    first = json.loads(done.stdout)["first_frame_ms"]
    return {
        "help_s": round(help_s, 3), "stream_first_block_ms": first,
        "stream_0.2s_process_s": round(whole_s, 3),
        "stream_imports_torch_or_onnx": imported.strip().splitlines()[-1],
    }  # fmt: skip


def revision() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def profile_record(profile: Profile) -> dict[str, Any]:
    return {
        "name": profile.name,
        "timesteps": profile.sampler.timesteps,
        "frame_tokens": profile.frame_tokens,
        "window": profile.window.frames,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--blocks", type=int, default=LONG_BLOCKS, help="length of the long stream")
    parser.add_argument("--out", type=Path, default=None, help="record to write")
    options = parser.parse_args()
    today = datetime.date.today().isoformat()
    with TemporaryDirectory() as folder:
        loaded = checkpoint.load(assets.CHECKPOINT, assets.checkpoint_sha256())
        path = Path(folder) / "bundle"
        export.export_bundle(loaded, path, False, say)
        bundle = Bundle.open(path)
        for backend in ("onnxruntime", "torch"):
            build.build_engine(bundle, backend, None, BuildOptions(say))
        say("step latency")
        latency = measure_bundle(bundle, "onnxruntime", None, 200, say, lambda text: None)
        record = {
            "what": "aapt_deploy on a CPU", "date": today, "git": revision(), "machine": machine(),
            "load_before": os.getloadavg(),
            "versions": {"torch": torch.__version__.split("+")[0], "numpy": np.__version__},
            "seed": 0,
            "profile": profile_record(loaded.profile), "engines": bundle.engines,
            "latency": {**json.loads(latency.json())},
            "side_by_side": paired(bundle, loaded), "commit": commit(bundle), "start": start(path),
            "long_stream": flat(bundle, options.blocks),
        }  # fmt: skip
    out = options.out or ROOT / "docs" / "measurements" / f"cpu-{today}.json"
    out.write_text(json.dumps(record, indent=1) + "\n")
    say(f"record: {out}")
    summary = {
        key: {k: v for k, v in record[key].items() if not isinstance(v, list)}
        for key in ("commit", "start", "long_stream")
    }  # type: ignore[attr-defined]
    print(
        json.dumps(
            {
                "step": latency.steady["step"].__dict__,
                "ratios": record["side_by_side"]["ratio_to_onnxruntime_fp32"],
                **summary,
            }
        )
    )  # type: ignore[index]


if __name__ == "__main__":
    main()
