"""`aapt doctor`: check this machine, TensorRT on it (--tensorrt), or the files of a bundle."""

import json
from dataclasses import asdict
from pathlib import Path

import typer

from aapt_deploy.cli import options as opt
from aapt_deploy.errors import UsageError, VerdictError


def doctor(
    bundle: opt.CheckedBundle = None, tensorrt: opt.Tensorrt = False, as_json: opt.Json = False
) -> None:
    """Check what this machine can run, and print the fix for what it cannot.

    Exit 3 if streaming on the CPU would fail; with --tensorrt, if every plan would.
    With BUNDLE, check that each of its files is whole instead, and say which of its engines this
    machine can run. Exit 4 at the first file that is not whole.
    """
    if bundle and tensorrt:
        raise UsageError("--tensorrt checks this machine, and BUNDLE a bundle", "leave one out")
    record, passed = _verify(bundle) if bundle else _ask_tensorrt() if tensorrt else _examine()
    if as_json:
        typer.echo(json.dumps(record))
    raise typer.Exit(0 if passed else VerdictError.exit_code)


def _verify(bundle: Path) -> tuple[object, bool]:
    """Check every file of `bundle`; return the record."""
    from aapt_deploy.bundle.bundle import Bundle
    from aapt_deploy.cli import console, reports
    from aapt_deploy.measure.doctor import engines

    opened = Bundle.open(bundle)
    count = opened.verify()
    console.say(f"{count} files, all whole")
    if checks := engines(opened):
        reports.doctor(checks)
    found = [asdict(check) for check in checks]
    return {"bundle": str(bundle), "files": count, "engines": found}, True


def _examine() -> tuple[object, bool]:
    """Check and report this machine; return the record, and whether all that is needed is here."""
    from aapt_deploy.cli import reports
    from aapt_deploy.measure.doctor import examine

    checks = examine()
    reports.doctor(checks)
    return [asdict(check) for check in checks], all(c.ok for c in checks if c.needed)


def _ask_tensorrt() -> tuple[object, bool]:
    """Ask TensorRT and report; return the record, and whether a plan can be used here."""
    from aapt_deploy.backends.trt.doctor import ask
    from aapt_deploy.cli import console, reports

    with console.steps("asking TensorRT") as step:
        findings = ask.examine(step)
    reports.tensorrt(findings)
    checks = [asdict(proof) for proof in findings.proofs]
    return {"verified_on": asdict(findings.here), "checks": checks}, findings.usable
