"""Results as people read them: one function per command, all on stderr."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aapt_deploy.cli.console import say, table

if TYPE_CHECKING:
    from aapt_deploy.backends.trial import Built
    from aapt_deploy.backends.trt.doctor.ask import Findings
    from aapt_deploy.bundle.bundle import Bundle
    from aapt_deploy.export.parity import Parity
    from aapt_deploy.measure.diff import Change, Difference
    from aapt_deploy.measure.doctor import Check
    from aapt_deploy.measure.latency import Latency
    from aapt_deploy.measure.quality import Loss
    from aapt_deploy.models.cost import Cost
    from aapt_deploy.models.fp8 import Coverage
    from aapt_deploy.rollout.engine import LayerTime
    from aapt_deploy.stream.stream import Streamed

LAYERS_SHOWN = 15  # of a graph
NAME_SHOWN = 60  # characters of a layer's or kernel's name

ENGINES = ("engine", "step ms", "MB", "threads", "PSNR dB vs fp32", "build s")
PLAN = (
    "graph", "products GFLOP", "attention GFLOP", "weights GB", "activations GB", "floor ms",
    "bound by",
)  # fmt: skip
EVALUATION = (
    "seconds", "sharpness", "colour", "distance", "dynamics", "flow", "yaw", "strafe", "pitch",
    "forward", "prompt",
)  # fmt: skip
ENDED = {"done": "", "signal": ", stopped by a signal", "reader gone": ", the reader left"}


def _cells(form: str, *values: float | None, missing: str = "-") -> tuple[str, ...]:
    """Format each value with `form`."""
    return tuple(missing if value is None else format(value, form) for value in values)


def parity(rows: "Sequence[Parity]", out: Path) -> None:
    cells = [
        (row.graph, row.case, *_cells(".1e", row.error, row.relative), _ok(row.ok, "DIFFERS"))
        for row in rows
    ]
    table("ONNX Runtime against PyTorch", ("graph", "case", "max error", "relative", ""), cells)
    say(f"bundle: {out}")


def _ok(ok: bool, otherwise: str) -> str:
    return "ok" if ok else otherwise


def coverage(rows: "Sequence[Coverage]") -> None:
    """Print what is in FP8; nothing for an export without it."""
    for row in rows:
        rest = sorted(row.rest.items(), key=lambda item: -item[1])
        reasons = "; ".join(f"{share:.1%} {why}" for why, share in rest)
        without = f"; not: {reasons}" if reasons else ""
        say(f"{row.graph}: {row.fp8:.1%} of {row.gflop:.2f} GFLOP in FP8{without}")


def engines(rows: "Sequence[Built]") -> None:
    cells = []
    for row in rows:
        threads = f"{row.threads}{' spinning' * row.spinning}"
        missing = "reference" if row.step_ms is not None else "not run"
        psnr = _cells(".1f", row.psnr_db, missing=missing)
        size = _cells(".1f", row.step_ms, row.bytes / 1e6)
        cells.append((row.key, *size, threads, *psnr, f"{row.seconds:.1f}"))
    table("engines", ENGINES, cells)


def latency(result: "Latency") -> None:
    rows, bounded = [], bool(result.floor_ms)
    for name, t in result.steady.items():
        share: tuple[str, ...] = ("", "") if bounded else ()
        if floor := result.floor_ms.get(name):  # how near a stage comes to the hardware's limit
            share = (f"{floor:.2f}", f"{floor / t.p50_ms:.0%}")
        rows.append((name, *_cells(".2f", t.p50_ms, t.p95_ms, t.p99_ms, t.max_ms), *share))
    what = f"{result.profile}, {result.backend} {result.precision}"
    columns = ("stage", "p50", "p95", "p99", "max", *(("floor", "roofline") if bounded else ()))
    table(f"{what}: ms per block, {result.blocks} steady blocks", columns, rows)
    for graph, layers in result.layers.items():
        _layers(graph, layers)
    cold, first = result.cold_step_ms, f"first block after {result.first_frame_ms:.0f} ms"
    opened = f"engines open in {result.open_ms:.0f} ms, {first}"
    say(f"cold: {opened}, slowest of the first {len(cold)} {max(cold):.0f} ms")
    late = f"{result.deadline_misses} of {result.blocks} blocks late"
    say(f"sustained: {result.sustained_fps:.1f} fps, {late}")
    p95, budget = result.steady["step"].p95_ms, result.budget_ms
    verdict = "within budget" if result.within_budget else "OVER BUDGET"
    say(f"verdict: {verdict}: step p95 {p95:.1f} ms of {budget:.1f} ms ({p95 / budget:.0%})")


def _layers(graph: str, layers: "Sequence[LayerTime]") -> None:
    cells = [
        (one.name[:NAME_SHOWN], one.kind, one.tactic[:NAME_SHOWN], *_times([one]))
        for one in layers[:LAYERS_SHOWN]
    ]
    if rest := layers[LAYERS_SHOWN:]:
        cells.append((f"{len(rest)} more", "", "", *_times(rest)))
    title = f"layers of {graph}, profiled on their own: slower than in a step"
    table(title, ("layer", "kind", "kernel", "ms", "share"), cells)


def _times(layers: "Sequence[LayerTime]") -> tuple[str, str]:
    share = sum(layer.share for layer in layers)
    return f"{sum(layer.ms for layer in layers):.3f}", f"{share:.1%}"


def difference(result: "Difference") -> None:
    if result.differs:
        rows = [(name, a, b) for name, (a, b) in result.differs.items()]
        table("not the same in both records", ("what", "A", "B"), rows)
    for kind, changes in result.stages.items():
        _changes(f"stages, {kind.removesuffix('_ms')}", changes)
    for graph, changes in result.layers.items():
        _changes(f"layers of {graph}, the largest changes", changes[:LAYERS_SHOWN])


def _changes(title: str, changes: "Sequence[Change]") -> None:
    rows = [
        (
            change.name[:NAME_SHOWN],
            *_cells(".3f", change.before_ms, change.after_ms),
            f"{change.delta_ms:+.3f}",
            *_cells(".2f", change.ratio, missing=""),
        )
        for change in changes
    ]
    table(title, ("", "A ms", "B ms", "B - A", "B / A"), rows)


def plan(result: "Cost") -> None:
    rows = [
        (
            stage.name,
            *_cells(",.1f", stage.products_gflop, stage.attention_gflop),
            *_cells(".3f", stage.weights_gb, stage.activations_gb),
            *_cells(".2f", stage.floor_ms, missing=""),
            stage.bound,
        )
        for stage in result.stages
    ]
    table(f"{result.profile} on {result.target}, by arithmetic alone", PLAN, rows)
    parts = ", ".join(f"{name} {gb:.2f}" for name, gb in result.memory_gb.items())
    fits = "fits" if result.fits else "DOES NOT FIT"
    limit = f" of {result.limit_gb} GB: {fits}" if result.limit_gb else " GB"
    say(f"memory while streaming, GB: {parts}; together {result.total_gb:.2f}{limit}")
    if result.floor_ms is not None:
        times = "" if result.latents == 1 else f" {result.latents} times"
        step = f"floor of a step, {result.passes} pass(es) and the decoder{times}"
        floor = f"{result.floor_ms:.1f} ms of {result.budget_ms:.1f} ms"
        say(f"{step}: {floor}; nothing was measured")


def quality(result: "Loss") -> None:
    rows = []
    for i, s in enumerate(result.seconds):
        frame = _cells(".3f", s.sharpness, s.brightness)
        rows.append((f"{i}-{i + 1}", f"{s.psnr_db:.1f}", f"{s.ssim:.4f}", *frame))
    columns = ("second", "PSNR dB", "SSIM", "sharpness", "brightness")
    table(f"{result.candidate} against {result.reference}, each on its own", columns, rows)
    errors, decoder = result.latent_error, f"decoder {result.decoder_psnr_db:.1f} dB"
    error = f"{sum(errors) / len(errors):.4f} a pass, largest block {max(errors):.4f}"
    say(f"same inputs: latent error {error}; {decoder}")
    blocks = f"{result.flat_blocks} flat and {result.still_blocks} still blocks of {result.blocks}"
    say(f"drift {result.drift:.3f}, {result.drift_per_s:.3f} a second; {blocks}")
    verdict = "; ".join(result.failures).upper() or "within the profile's thresholds"
    say(f"verdict: {verdict}")


def streamed(result: "Streamed") -> None:
    where = "stdout" if result.output == "-" else result.output
    made = f"{result.frames} frames, {result.seconds:.1f} s of video at {result.fps:.1f} fps"
    first = f"first block after {result.first_frame_ms:.0f} ms"
    say(f"{where}: {made}, {first}{ENDED[result.ended]}")


def doctor(checks: "Sequence[Check]") -> None:
    width = max(len(check.name) for check in checks)
    for check in checks:
        state = _ok(check.ok, "MISSING" if check.needed else "absent")
        say(f"{check.name:<{width}}  {state:<7}  {check.found}")
        if check.fix and not check.ok:
            say(f"{'':<{width}}           fix: {check.fix}")


def evaluation(record: dict[str, Any], out: Path) -> None:
    def row(what: str, window: dict[str, Any]) -> tuple[str, ...]:
        prompts = window["prompt"].values()
        measured = [window[name] for name in EVALUATION[1:6]]
        figures = (*measured, *window["gains"].values(), sum(prompts) / len(prompts))
        return (what, *_cells(".2f", *figures))

    def span(window: dict[str, Any]) -> str:
        return f"{window['from_s']}-{window['from_s'] + record['window_s']}"

    for name, result in record["made"].items():
        rows = [row(span(window), window) for window in result["windows"]]
        if "again" in result:
            rows.append(row("anew", result["again"]))
        true = [window for part in ("window", "last") if (window := record["true"].get(part))]
        rows += [row(f"true, {span(window)}", window) for window in true]
        table(f"{name}: {record['flights']} flights, {result['engine']}", EVALUATION, rows)
        found = result["windows"][-1]["gain_errors"].items()
        errors = ", ".join(f"{word} {error:.2f}" for word, error in found if error is not None)
        say(f"standard errors of the last answers to the camera: {errors}")
        last, seconds = result["seconds"][-1], len(result["seconds"]) - 1
        terrain = f"terrain {last['terrain']:.2f} (start frame kept: {last['still']:.2f})"
        say(f"after {seconds} s: {terrain}, recognised {last['recognised']:.0%}")
    say(f"record, curves and frames: {out}")


def demo(result: "Latency", video: Path, bundle: "Bundle") -> None:
    say("")
    verdict = "real time" if result.within_budget else "NOT real time"
    speed = f"{result.sustained_fps:.0f} fps of {result.machine['cores']} CPU cores"
    say(f"{verdict}: {speed}, 24 needed")
    say(f"video: {video}")
    frames, path = ", ".join(bundle.manifest["start_frames"]), shlex.quote(str(bundle.path))
    command = f"aapt stream {path} -o flight.mp4 --seconds 20 --image NAME"
    say(f"next: {command}   (names: {frames})")


def tensorrt(findings: "Findings") -> None:
    here, best = findings.here, findings.choices[0]
    rows = [(p.name, _ok(p.ok, "NO"), f"{p.seconds:.1f}", p.found) for p in findings.proofs]
    versions = f"TensorRT {here.tensorrt}, CUDA {here.cuda}, driver {here.driver}"
    table(f"{here.gpu} (SM {here.sm}), {versions}", ("question", "", "s", "found"), rows)
    form = f"attention in form {best.form} for an fp8 bundle"
    say(f"aapt build-engine would take {form}: {best.reason}")
    say(f"receipt: {findings.receipt}")
