"""Everything that waits for a Hopper GPU, in one command and in order of worth.

    python bench/gpu.py --out DIR                  # ten minutes at most
    python bench/gpu.py --out DIR --budget 200     # goes on with what is not finished

A smoke run decides how the rest runs: in FP8 with the fastest variant of the kernel, or, where
FP8 is wrong or hangs, in bf16. Every part is on stdout and in DIR/record.json as soon as it is
done; DIR/log.txt has a running clock. A stage has a share of the time, and what stages before it
left over, up to twice its share. What is finished is skipped when the command runs again.
Needs torch for CUDA, triton, and cuda-bindings with NVRTC; no git, no network, no other package.
`--small` tries all of it on a CPU. Exit codes: 0 all goals hold, 3 not so, 5 no Hopper GPU.
"""

import argparse
import datetime
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

BENCH = Path(__file__).parent
sys.path[:0] = [str(BENCH), str(BENCH.parent)]
from stages import HOW, META, NO_GPU, Parts, Record, run_stage, say

WHOLE_S = 780  # of fifteen minutes, without the machine's start
BUDGET_S = 560  # of one command
SMOKE_S = 25
ASKED_FOR = ("sanitizer",)  # run only when `--only` names them


class Stage(NamedTuple):
    """One stage of a bench."""

    script: str
    seconds: float  # its share of the time


STAGES = {  # in order of worth
    "machine": Stage("attention.py", 30),
    "smoke": Stage("attention.py", SMOKE_S),
    "products": Stage("attention.py", 30),
    "speed": Stage("attention.py", 100),
    "correct": Stage("attention.py", 80),
    "wide": Stage("headline.py", 140),
    "kernels": Stage("headline.py", 40),
    "rivals": Stage("headline.py", 50),
    "hd15": Stage("headline.py", 60),
    "parity": Stage("headline.py", 45),
    "tests": Stage("gpu.py", 40),
    "ablations": Stage("headline.py", 60),
    "hd30": Stage("headline.py", 55),
    "compile": Stage("headline.py", 25),
    "sanitizer": Stage("attention.py", 110),
}
FIRST = ("machine", "smoke")  # what every bench begins with


def allowed(name: str, spare: float, left: float) -> float:
    """Seconds that a stage may take: its share and what is spare, up to twice its share."""
    share = STAGES[name].seconds
    most = share if name == "smoke" else min(2 * share, share + max(0.0, spare))
    return min(most, left)


def decided(record: dict[str, Any]) -> dict[str, str]:
    """How the stages behind the smoke run: precision, variant of the kernel, and why."""
    smoke = record.get("smoke", {})
    parts = {name: found for name, found in smoke.items() if name.startswith("fp8 ")}
    wrong = [name for name, found in parts.items() if not found.get("ok")]
    if len(parts) < 3 or wrong:
        why = f"wrong: {', '.join(wrong)}" if wrong else smoke.get("error", "no smoke run")
        return {"precision": "bf16", "why": str(why)}
    fastest = fastest_variant(record)
    if fastest is None:
        return {"precision": "fp8", "why": "smoke is right"}
    why = "smoke is right; the fastest right variant"
    return {"precision": "fp8", "variant": fastest, "why": why}


def fastest_variant(record: dict[str, Any]) -> str | None:
    """Of those that gave the right bits and were timed on all shapes, the one that takes least."""
    times: dict[str, list[float]] = {}
    smoke = record.get("smoke", {}).items()
    passed = [name for name, found in smoke if name.startswith("variant ") and found.get("ok")]
    right = {name.removeprefix("variant ") for name in passed}
    for name, found in record.get("speed", {}).items():
        variant = name.rpartition(": ")[2].removesuffix(", again")
        if variant in right and isinstance(found, dict) and "ms" in found:
            times.setdefault(variant, []).append(found["ms"])
    whole = {variant: t for variant, t in times.items() if len(t) == max(map(len, times.values()))}
    return min(whole, key=lambda variant: sum(whole[variant]), default=None)


def command(name: str, record: dict[str, Any]) -> list[str]:
    how = record.get("decided", {})
    options = [f"--{key}={how[key]}" for key in ("precision", "variant") if key in how]
    small = ["--small"] if HOW.small else []
    return [sys.executable, str(BENCH / STAGES[name].script), "--stage", name, *options, *small]


def revision() -> str | None:
    """Of the source; None where git or its folder is missing."""
    ask = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, cwd=BENCH, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def run(names: list[str], out: Path, budget: float) -> int:
    """Run stages one by one, those that are finished excepted; the exit code."""
    begin = time.monotonic()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        say(f"error: cannot make the folder {out}: {error.strerror}")
        say("hint: name another one: --out DIR")
        return 2
    what = "kernels and engine on one Hopper GPU; weights are random"
    today = datetime.date.today().isoformat()
    record = Record(out, {"what": what, "date": today, "git": revision(), "small": HOW.small})
    if record.found.get("small") != HOW.small:
        say(f"error: {record.path} has figures of {'a GPU' if HOW.small else '--small'}")
        say("hint: name another folder: --out DIR")
        return 2
    shares, on_a_gpu = 0.0, True
    try:
        for name in names:
            done = record.found.get(name, {})
            if done.get("finished"):
                record.say(f"{name}: finished before")
                continue
            elapsed = time.monotonic() - begin
            limit = allowed(name, shares - elapsed, budget - elapsed)
            shares += STAGES[name].seconds
            if limit < STAGES[name].seconds / 2:
                record.say(f"{name}: no time left")
                continue
            if run_one(name, limit, record) == NO_GPU:
                on_a_gpu = False
                break
    finally:
        if on_a_gpu:
            record.found["goals"] = goals(record.found)
            record.write()
            for line in table(names, record.found):
                record.say(line)
    if not on_a_gpu:
        return without_a_gpu(out)
    if record.complaint:
        say(f"error: {record.path} could not be written: {record.complaint}")
        say("hint: every part is on stdout; or make room and run this again")
    unfinished = [name for name in names if not record.found.get(name, {}).get("finished")]
    held = record.found["goals"]
    kept = not record.complaint
    return 0 if kept and not unfinished and held and all(held.values()) else 3


def run_one(name: str, limit: float, record: Record) -> int | None:
    """One stage; its exit code."""
    record.say(f"{name}: begins, {limit:.0f} s at most")
    had = record.found.get(name, {})
    skip = [part for part in had if part not in META and not failed(had[part])]
    for key in META:
        had.pop(key, None)
    heard = lambda part, result: record.note(name, part, result)
    told = lambda line: record.say(f"{name}: {line}")
    ended = run_stage(command(name, record.found), limit, heard, told, skip)
    if ended["exit_code"] == NO_GPU:
        return NO_GPU
    record.found.setdefault(name, {}).update(ended | {"allowed_s": round(limit, 1)})
    if name in ("smoke", "speed"):
        record.found["decided"] = decided(record.found)
        record.say(f"from here on: {record.found['decided']}")
    record.write()
    record.say(f"{name}: {ended.get('error') or 'done'} ({ended['seconds']} s)")
    code: int | None = ended["exit_code"]
    return code


def failed(part: Any) -> bool:
    """Whether a part gave no result."""
    return isinstance(part, dict) and "error" in part and "ok" not in part


def without_a_gpu(out: Path) -> int:
    for path in (out / "log.txt", out / "record.json"):
        path.unlink(missing_ok=True)
    if not any(out.iterdir()):
        out.rmdir()
    say("error: PyTorch finds no Hopper GPU")
    say("hint: run this where an H100 or H200 is; --small tries its code on a CPU")
    return NO_GPU


def goals(record: dict[str, Any]) -> dict[str, bool]:
    """What must hold, of the stages that gave a result."""
    from attention_model import goals as of_attention
    from headline_model import goals as of_headline

    return {**of_attention(record), **of_headline(record)}


def table(names: list[str], record: dict[str, Any]) -> list[str]:
    """A line for each stage, and one for each goal."""
    lines = [f"{'stage':<10} {'state':<12} {'s':>6} {'of':>6} {'parts':>5} {'wrong':>5}"]
    for name in names:
        found = record.get(name, {})
        parts = [found[key] for key in found if key not in META]
        bad = sum(failed(p) or (isinstance(p, dict) and p.get("ok") is False) for p in parts)
        state = "finished" if found.get("finished") else "cut short" if found else "not begun"
        seconds, share = found.get("seconds", 0), found.get("allowed_s", 0)
        lines.append(f"{name:<10} {state:<12} {seconds:>6} {share:>6} {len(parts):>5} {bad:>5}")
    held = [f"{'yes' if holds else 'NO ':<4} {goal}" for goal, holds in record["goals"].items()]
    return lines + held


# --- the engine's tests ---


def tests(parts: Parts) -> None:
    """The tests that are marked `gpu`, each a part. Without conftest.py, which reads videos."""
    import pytest

    class Told:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                words = str(report.longrepr)[-600:] if report.failed else ""
                ok = None if report.skipped else report.passed
                found = {"outcome": report.outcome, "seconds": round(report.duration, 2), "ok": ok}
                parts.note(report.nodeid, {**found, **({"error": words} if words else {})})

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                parts.note(report.nodeid, {"error": str(report.longrepr)[-600:]})

    root = BENCH.parent
    marked = sorted(p for p in root.glob("tests/**/test_*.py") if "mark.gpu" in p.read_text())
    if HOW.precision == "bf16":  # the kernels are wrong or hang, and have said so
        marked = [p for p in marked if "kernels" not in p.name]
    os.chdir(root)
    plain = ["-q", "-m", "gpu", "--noconftest", "-p", "no:cacheprovider", "-W", "default"]
    pytest.main([*plain, *map(str, marked)], plugins=[Told()])


# --- the command ---


def main(runnable: dict[str, Callable[[Parts], None]], script: str) -> None:
    """A bench: one of its stages in this process, or all of them, each in its own."""
    about = (sys.modules["__main__"].__doc__ or script).splitlines()[0]
    parser = argparse.ArgumentParser(description=about)
    own = [n for n, stage in STAGES.items() if script in ("gpu.py", stage.script) or n in FIRST]
    parser.add_argument("--out", type=Path, help="folder of the record and the log")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for this command")
    parser.add_argument("--only", nargs="+", choices=own, default=None, help="stages to run")
    parser.add_argument("--small", action="store_true", help="on a CPU: only whether it runs")
    parser.add_argument("--stage", choices=runnable, help="run one stage in this process")
    parser.add_argument("--skip", nargs="+", default=[], help="parts of the stage not to run")
    parser.add_argument("--seconds", type=float, default=3600, help="for the stage")
    parser.add_argument("--precision", choices=["fp8", "bf16"], default="fp8")
    parser.add_argument("--variant", help="of aapt_attend")
    options = parser.parse_args()
    HOW.small, HOW.precision = options.small, options.precision
    if options.stage:
        if options.variant:
            from aapt_deploy.ops.block_causal_attention import kernels

            assert options.variant in kernels.VARIANTS, f"{options.variant=}"
            kernels.CHOSEN = options.variant
        runnable[options.stage](Parts(options.skip, options.seconds, printed=True))
        return
    if options.out is None:
        parser.error("--out DIR is needed: where results go")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names = options.only or [name for name in own if name not in ASKED_FOR]
    raise SystemExit(run([name for name in STAGES if name in names], options.out, options.budget))


if __name__ == "__main__":
    main({"tests": tests}, Path(__file__).name)
