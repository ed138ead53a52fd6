"""`aapt doctor`: what this machine can run, and with --tensorrt what TensorRT does on it. It parses, calls and reports, as commands.py does."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from aapt_deploy.cli.options import Json
from aapt_deploy.errors import UsageError, VerdictError


def doctor(
    bundle: Annotated[
        Path | None,
        typer.Argument(help="Check every file of this bundle against its manifest instead.", metavar="BUNDLE"),
    ] = None,
    tensorrt: Annotated[
        bool, typer.Option("--tensorrt", help="Ask TensorRT itself, with one micro-engine a question, and keep the answers for build-engine.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Tell what this machine can run, and the fix for what it cannot. Exit 3 if streaming on the CPU (--tensorrt: any plan) would fail.

    With BUNDLE, check that every file of it is whole. Exit 4 at the first that is not.

    The questions of --tensorrt are what we could not try ourselves: they were never run by us on TensorRT.
    """
    from aapt_deploy.cli import console, reports

    if bundle:
        _verify(bundle, tensorrt, as_json)
        return
    if tensorrt:
        from aapt_deploy.backends.trt.doctor import ask

        with console.steps("asking TensorRT") as step:
            findings = ask.examine(step)
        reports.tensorrt(findings)
        if as_json:
            typer.echo(json.dumps({"verified_on": asdict(findings.here), "checks": [asdict(proof) for proof in findings.proofs]}))
        raise typer.Exit(0 if findings.usable else VerdictError.exit_code)
    from aapt_deploy.measure.doctor import examine

    checks = examine()
    reports.doctor(checks)
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks]))
    raise typer.Exit(0 if all(check.ok for check in checks if check.needed) else VerdictError.exit_code)


def _verify(bundle: Path, tensorrt: bool, as_json: bool) -> None:
    from aapt_deploy.bundle.bundle import Bundle
    from aapt_deploy.cli import console

    if tensorrt:
        raise UsageError("--tensorrt checks this machine, and BUNDLE a bundle", "leave one of them out")
    count = Bundle.open(bundle).verify()
    console.say(f"{count} files, all whole")
    if as_json:
        typer.echo(json.dumps({"bundle": str(bundle), "files": count}))
