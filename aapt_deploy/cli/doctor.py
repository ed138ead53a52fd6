"""`aapt doctor`: what this machine can run, and with --tensorrt what TensorRT does on it. It parses, calls and reports, as commands.py does."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from aapt_deploy.cli.options import Json
from aapt_deploy.errors import VerdictError


def doctor(
    tensorrt: Annotated[
        bool, typer.Option("--tensorrt", help="Ask TensorRT itself, with one micro-engine a question, and keep the answers for build-engine.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Tell what this machine can run, and the fix for what it cannot. Exit 3 if streaming on the CPU (--tensorrt: any plan) would fail.

    The questions of --tensorrt are what we could not try ourselves: they were never run by us on TensorRT.
    """
    from aapt_deploy.cli import console, reports

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
