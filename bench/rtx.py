"""Measure TensorRT-RTX's builds: time, peak memory, size of the plans. No GPU is needed.

Writes docs/measurements/rtx-builds-<date>.json. Every graph is lowered here and built in a process
of its own (rtx_build.py), so that its peak of resident memory is its own. A graph that TensorRT-RTX
refuses is a row with the reason. Plans are not run.

The 8B shape has random weights and one or two of its 36 layers, all in FP8. Its exported graphs are
not compared with PyTorch, which takes minutes and changes no figure.

Times depend on what else runs. Each row has the load average before and after. It also has the
build's processor time, which a busy machine changes less. A record is marked as of a loaded
machine if other work kept more than half a core busy.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np

from aapt_deploy import assets
from aapt_deploy.backends.trial import BuildOptions
from aapt_deploy.backends.trt import kept_plans
from aapt_deploy.backends.trt.build import may_decompose
from aapt_deploy.backends.trt.doctor.receipts import NATIVE, NATIVE_FP8
from aapt_deploy.backends.trt.flavour import FP8_SM, RTX
from aapt_deploy.backends.trt.loading import api_of
from aapt_deploy.backends.trt.lower import lower
from aapt_deploy.backends.trt.order import take_order
from aapt_deploy.backends.trt.plans import Settings
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.bundle.scales import LinearScales, Scales
from aapt_deploy.errors import AaptError
from aapt_deploy.export import export
from aapt_deploy.measure.machine import machine
from aapt_deploy.models import checkpoint, fp8, random_weights
from aapt_deploy.models.checkpoint import Stored
from aapt_deploy.models.family import family_of
from aapt_deploy.ops.block_causal_attention import hopper_fp8
from aapt_deploy.profiles import load

ROOT = Path(__file__).parent.parent
BUILD = Path(__file__).with_name("rtx_build.py")
LARGE = "aapt-8b-736x416-rtx-5090"
FORMS = {  # name of a row: precision, form of attention, precision of the bundle
    "fp32": ("fp32", NATIVE, "fp32"),
    "bf16": ("bf16", NATIVE, "fp32"),
    "fp8": ("fp8", NATIVE, "fp8"),
    "native-fp8": ("fp8", NATIVE_FP8, "fp8"),
}
DEEP = ("prompt", "generator")  # graphs that change with the depth
QUIET_CORES = 0.5  # that other work may keep busy
OUTER = ("*.first.*", "*.last.*")  # rules of a profile's [fp8] section
SCALE = 1 / 32  # any power of two: a build does not depend on it


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Case:
    """One profile, and what to build of it."""

    name: str
    preset: str = ""  # of random weights; "": the embedded checkpoint
    depth: int = 0  # 0: the preset's
    forms: tuple[str, ...] = tuple(FORMS)
    graphs: tuple[str, ...] = ()  # (): all


# No engine of the 8B in fp32 is of use, and none would fit a GeForce.
HALF = ("bf16", "fp8", "native-fp8")
CASES = (
    Case("tiny", "tiny-cpu"),
    Case("demo"),
    Case("8B, 1 layer", LARGE, 1, HALF),
    Case("8B, 2 layers", LARGE, 2, HALF, DEEP),
)


def in_a_process(graph: Path, settings: Settings) -> dict[str, Any]:
    """Build in a new process; return its result, and the load average before and after."""
    plain = {name: value for name, value in asdict(settings).items() if name != "timing_cache"}
    before = os.getloadavg()[0]
    done = subprocess.run(
        [sys.executable, str(BUILD)],
        input=json.dumps({"graph": str(graph), "settings": plain}),
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    loads = {"load_average": [round(before, 2), round(os.getloadavg()[0], 2)]}
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        return {"refused": f"the process ended with {done.returncode}: {said[-1]}", **loads}
    return {**json.loads(done.stdout.splitlines()[-1]), **loads}


# Bundles


def stored_of(case: Case, folder: Path) -> Stored:
    if not case.preset:
        return checkpoint.stored(assets.CHECKPOINT, assets.checkpoint_sha256())
    profile = load(case.preset)
    model = replace(profile.model, depth=case.depth or profile.model.depth)
    path = folder / "random.safetensors"
    # By default the first and last blocks stay out of FP8: here that would be all of them.
    keep = tuple(rule for rule in profile.fp8.keep if rule not in OUTER)
    chosen = replace(profile, model=model, fp8=replace(profile.fp8, keep=keep))
    random_weights.random_checkpoint(chosen, path, 0)
    return checkpoint.stored(path)


def any_scales(stored: Stored) -> Scales:
    """Scales of the right shapes. A calibration takes hours at 8B, and a build asks for none."""
    profile, (generator, _) = stored.profile, checkpoint.hollow(stored.profile)
    full = lambda *shape: np.full(shape, SCALE, np.float32)
    linear = {
        layer.path: LinearScales(full(1), full(len(generator.get_submodule(layer.path).weight)))
        for layer in fp8.layers(generator, profile.fp8.keep)
        if not layer.kept_by
    }
    heads, head_dim = profile.model.heads, profile.head_dim
    one_layer = hopper_fp8.Scales(
        full(heads), full(heads), np.zeros((heads, head_dim), np.float32), full(heads, head_dim)
    )
    return Scales(linear, [one_layer] * profile.model.depth, {})


def bundles(case: Case, folder: Path) -> dict[str, Bundle]:
    """Export the checkpoint of `case` in each precision that its forms need."""
    stored, made = stored_of(case, folder), {}
    for precision in dict.fromkeys(FORMS[form][2] for form in case.forms):
        scales = any_scales(stored) if precision == "fp8" else None
        with mock.patch.object(export, "_check_whole", return_value=[]):
            export.export_bundle(stored, folder / precision, False, lambda text: None, scales)
        made[precision] = Bundle.open(folder / precision)
    return made


def rows(case: Case, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the row of each form and graph."""
    exported = bundles(case, folder)
    for name in case.forms:
        precision, form, source = FORMS[name]
        bundle = exported[source]
        sms = tuple(sm for sm in RTX.default_sms if precision != "fp8" or sm >= FP8_SM)
        options = BuildOptions(lambda text: None, form if precision == "fp8" else "auto", sms)
        order, _ = take_order(bundle, precision, options, RTX)
        for graph in case.graphs or family_of(bundle.profile).signatures(bundle.profile):
            lowered = lower(
                bundle, graph, precision, order.choice, order.scales, folder / f"{name}-{graph}"
            )
            settings = Settings(
                0,
                kept_plans.workspace_bytes(order, graph),
                may_decompose(graph, precision),
                order.sms,
            )
            what = {"shape": case.name, "form": name, "graph": graph, "sms": list(order.sms)}
            yield what | in_a_process(lowered.path, settings)


# The record


def revision() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"


def loaded(row: dict[str, Any]) -> bool:
    """Whether other work took part of the cores while a row was measured."""
    return bool(min(row["load_average"]) - 1 > QUIET_CORES)  # 1: the build itself


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: each shape and form, its graphs summed; memory is the largest graph's."""
    lines = [
        "| shape | form | build, s | processor, s | plans, MB | peak memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    for shape, form in dict.fromkeys((row["shape"], row["form"]) for row in found):
        part = [row for row in found if (row["shape"], row["form"]) == (shape, form)]
        if refused := [row["graph"] for row in part if "refused" in row]:
            lines.append(f"| {shape} | {form} | refused: {', '.join(refused)} | | | |")
            continue
        total = {key: sum(row[key] for row in part) for key in ("build_s", "processor_s")}
        size = sum(row["plan_mb"] for row in part)
        cells = [*(f"{value:.1f}" for value in total.values()), f"{size:.1f}"]
        peak = max(row["peak_mb"] for row in part)
        lines.append(f"| {shape} | {form} | {' | '.join(cells)} | {peak:.0f} |")
    return "\n".join(lines)


def record(cases: tuple[Case, ...]) -> dict[str, Any]:
    """Measure all of `cases`."""
    version, found = api_of(RTX).version(), list[dict[str, Any]]()
    for case in cases:
        with TemporaryDirectory() as folder:
            say(f"{case.name}: exporting")
            for row in rows(case, Path(folder)):
                found.append(row)
                made = row.get("refused") or f"{row['build_s']} s, {row['peak_mb']:.0f} MB"
                say(f"{case.name} {row['form']} {row['graph']}: {made}")
    return {
        "what": "builds of TensorRT-RTX plans on a CPU; no GPU took part, and no plan was run",
        "date": datetime.date.today().isoformat(), "git": revision(), "machine": machine(),
        "loaded_machine": any(map(loaded, found)), "versions": {"tensorrt_rtx": version},
        "weights": "demo: the embedded checkpoint; others random; scales of fp8 are constants",
        "rows": found,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    names = [case.name for case in CASES]
    parser.add_argument("--only", choices=names, action="append", help="a shape; may be repeated")
    parser.add_argument("--out", type=Path, default=None, help="record to write")
    options = parser.parse_args()
    try:
        made = record(tuple(case for case in CASES if case.name in (options.only or names)))
    except AaptError as error:
        say(f"error: {error}\nhint: {error.hint}")
        sys.exit(error.exit_code)
    out = options.out or ROOT / "docs" / "measurements" / f"rtx-builds-{made['date']}.json"
    out.write_text(json.dumps(made, indent=1) + "\n")
    say(f"record: {out}")
    if made["loaded_machine"]:
        say("warning: the machine was loaded; build times are longer than on a quiet one")
    print(table(made["rows"]))


if __name__ == "__main__":
    main()
