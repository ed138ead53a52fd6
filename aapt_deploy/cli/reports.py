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


def parity(rows: "Sequence[Parity]", out: Path) -> None:
    cells = [(row.graph, row.case, f"{row.error:.1e}", f"{row.relative:.1e}", "ok" if row.ok else "DIFFERS") for row in rows]
    table("ONNX Runtime against PyTorch", ("graph", "case", "max error", "relative", ""), cells)
    say(f"bundle: {out}")


def coverage(rows: "Sequence[Coverage]") -> None:
    """What is in FP8; nothing for an export without it."""
    for row in rows:
        rest = "; ".join(f"{share:.1%} {why}" for why, share in sorted(row.rest.items(), key=lambda item: -item[1]))
        say(f"{row.graph}: {row.fp8:.1%} of {row.gflop:.2f} GFLOP in FP8{'; not: ' + rest if rest else ''}")


def engines(rows: "Sequence[Built]") -> None:
    cells = [
        (row.key, f"{row.step_ms:.1f}", f"{row.bytes / 1e6:.1f}", f"{row.threads}{' spinning' * row.spinning}",
         "reference" if row.psnr_db is None else f"{row.psnr_db:.1f}", f"{row.seconds:.1f}")
        for row in rows
    ]  # fmt: skip
    table("engines", ("engine", "step ms", "MB", "threads", "PSNR dB vs fp32", "build s"), cells)


def latency(result: "Latency") -> None:
    rows, columns = [], ("stage", "p50", "p95", "p99", "max", *(("floor", "roofline") if result.floor_ms else ()))
    for name, t in result.steady.items():
        floor = result.floor_ms.get(name)  # how near a stage comes to what the hardware allows
        share = (f"{floor:.2f}", f"{floor / t.p50_ms:.0%}") if floor else ("", "") if result.floor_ms else ()
        rows.append((name, f"{t.p50_ms:.2f}", f"{t.p95_ms:.2f}", f"{t.p99_ms:.2f}", f"{t.max_ms:.2f}", *share))
    table(f"{result.profile}, {result.backend} {result.precision}: ms per block, {result.blocks} steady blocks", columns, rows)
    for graph, layers in result.layers.items():
        _layers(graph, layers)
    cold = result.cold_step_ms
    opened = f"engines open in {result.open_ms:.0f} ms, first block after {result.first_frame_ms:.0f} ms"
    say(f"cold: {opened}, slowest of the first {len(cold)} {max(cold):.0f} ms")
    say(f"sustained: {result.sustained_fps:.1f} fps, {result.deadline_misses} of {result.blocks} blocks late")
    p95 = result.steady["step"].p95_ms
    verdict = "within budget" if result.within_budget else "OVER BUDGET"
    say(f"verdict: {verdict}: step p95 {p95:.1f} ms of {result.budget_ms:.1f} ms ({p95 / result.budget_ms:.0%})")


def _layers(graph: str, layers: "Sequence[LayerTime]") -> None:
    shown = layers[:LAYERS_SHOWN]
    cells = [(layer.name[:NAME_SHOWN], layer.kind, layer.tactic[:NAME_SHOWN], f"{layer.ms:.3f}", f"{layer.share:.1%}") for layer in shown]
    if rest := layers[LAYERS_SHOWN:]:
        cells.append((f"{len(rest)} more", "", "", f"{sum(layer.ms for layer in rest):.3f}", f"{sum(layer.share for layer in rest):.1%}"))
    table(f"layers of {graph}, profiled on their own: slower than in a step", ("layer", "kind", "kernel", "ms", "share"), cells)


def difference(result: "Difference") -> None:
    if result.differs:
        table("not the same in both records", ("what", "A", "B"), [(name, a, b) for name, (a, b) in result.differs.items()])
    columns = ("", "A ms", "B ms", "B - A", "B / A")
    for kind, changes in result.stages.items():
        table(f"stages, {kind.removesuffix('_ms')}", columns, [_change(change) for change in changes])
    for graph, changes in result.layers.items():
        table(f"layers of {graph}, the largest changes", columns, [_change(change) for change in changes[:LAYERS_SHOWN]])


def _change(change: "Change") -> tuple[str, ...]:
    times = ("-" if ms is None else f"{ms:.3f}" for ms in (change.before_ms, change.after_ms))
    return (change.name[:NAME_SHOWN], *times, f"{change.delta_ms:+.3f}", "" if change.ratio is None else f"{change.ratio:.2f}")


def plan(result: "Cost") -> None:
    rows = [
        (s.name, f"{s.products_gflop:,.1f}", f"{s.attention_gflop:,.1f}", f"{s.weights_gb:.3f}", f"{s.activations_gb:.3f}",
         "" if s.floor_ms is None else f"{s.floor_ms:.2f}", s.bound)
        for s in result.stages
    ]  # fmt: skip
    columns = ("graph", "products GFLOP", "attention GFLOP", "weights GB", "activations GB", "floor ms", "bound by")
    table(f"{result.profile} on {result.target}, by arithmetic alone", columns, rows)
    parts = ", ".join(f"{name} {gb:.2f}" for name, gb in result.memory_gb.items())
    limit = f" of {result.limit_gb} GB: {'fits' if result.fits else 'DOES NOT FIT'}" if result.limit_gb else " GB"
    say(f"memory while streaming, GB: {parts}; together {result.total_gb:.2f}{limit}")
    if result.floor_ms is not None:
        say(f"floor of a step, {result.passes} pass(es) and the decoder: {result.floor_ms:.1f} ms of {result.budget_ms:.1f} ms; nothing was measured")


def quality(result: "Loss") -> None:
    rows = [(f"{i}-{i + 1}", f"{s.psnr_db:.1f}", f"{s.ssim:.4f}", f"{s.sharpness:.3f}", f"{s.brightness:.3f}") for i, s in enumerate(result.seconds)]
    table(f"{result.candidate} against {result.reference}, each on its own", ("second", "PSNR dB", "SSIM", "sharpness", "brightness"), rows)
    errors = result.latent_error
    say(f"same inputs: latent error {sum(errors) / len(errors):.4f} a pass, largest block {max(errors):.4f}; decoder {result.decoder_psnr_db:.1f} dB")
    blocks = f"{result.flat_blocks} flat and {result.still_blocks} still blocks of {result.blocks}"
    say(f"drift {result.drift:.3f}, {result.drift_per_s:.3f} a second; {blocks}")
    say("verdict: " + ("; ".join(result.failures).upper() if result.failures else "within the profile's thresholds"))


def streamed(result: "Streamed") -> None:
    where = "stdout" if result.output == "-" else result.output
    end = {"done": "", "signal": ", stopped by a signal", "reader gone": ", the reader left"}[result.ended]
    made = f"{result.frames} frames, {result.seconds:.1f} s of video at {result.fps:.1f} fps"
    say(f"{where}: {made}, first block after {result.first_frame_ms:.0f} ms{end}")


def doctor(checks: "Sequence[Check]") -> None:
    cells = [(c.name, "ok" if c.ok else "MISSING" if c.needed else "absent", c.found) for c in checks]
    width = max(len(name) for name, _, _ in cells)
    for (name, state, found), check in zip(cells, checks, strict=True):
        say(f"{name:<{width}}  {state:<7}  {found}")
        if check.fix and not check.ok:
            say(f"{'':<{width}}           fix: {check.fix}")


def evaluation(record: dict[str, Any], out: Path) -> None:
    columns = ("seconds", "sharpness", "colour", "distance", "dynamics", "flow", "yaw", "strafe", "pitch", "forward", "prompt")

    def row(when: str, window: dict[str, Any]) -> tuple[str, ...]:
        figures = [*(window[name] for name in columns[1:6]), *window["gains"].values(), sum(window["prompt"].values()) / len(window["prompt"])]
        return (when, *("-" if figure is None else f"{figure:.2f}" for figure in figures))

    for name, result in record["made"].items():
        rows = [row(f"{w['from_s']}-{w['from_s'] + record['window_s']}", w) for w in result["windows"]]
        true = [row(f"true, {w['from_s']}-{w['from_s'] + record['window_s']}", w) for part in ("window", "last") if (w := record["true"].get(part))]
        anew = [row("anew", result["again"])] if "again" in result else []
        table(f"{name}: {record['flights']} flights, {result['engine']}", columns, [*rows, *anew, *true])
        errors = ", ".join(f"{command} {error:.2f}" for command, error in result["windows"][-1]["gain_errors"].items() if error is not None)
        say(f"standard errors of the last answers to the camera: {errors}")
        last = result["seconds"][-1]
        say(f"after {len(result['seconds']) - 1} s: terrain {last['terrain']:.2f} (start frame kept: {last['still']:.2f}), "
            f"recognised {last['recognised']:.0%}")  # fmt: skip
    say(f"record, curves and frames: {out}")


def demo(result: "Latency", video: Path, bundle: "Bundle") -> None:
    frames = ", ".join(bundle.manifest["start_frames"])
    say("")
    verdict = "real time" if result.within_budget else "NOT real time"
    say(f"{verdict}: {result.sustained_fps:.0f} fps of {result.machine['cores']} CPU cores, 24 needed")
    say(f"video: {video}")
    say(f"next: aapt stream {shlex.quote(str(bundle.path))} -o flight.mp4 --seconds 20 --image NAME   (names: {frames})")


def tensorrt(findings: "Findings") -> None:
    here = findings.here
    rows = [(proof.name, "ok" if proof.ok else "NO", f"{proof.seconds:.1f}", proof.found) for proof in findings.proofs]
    table(f"{here.gpu} (SM {here.sm}), TensorRT {here.tensorrt}, CUDA {here.cuda}, driver {here.driver}", ("question", "", "s", "found"), rows)
    best = findings.choices[0]
    say(f"aapt build-engine would take attention in form {best.form} for an fp8 bundle: {best.reason}")
    say(f"receipt: {findings.receipt}")
