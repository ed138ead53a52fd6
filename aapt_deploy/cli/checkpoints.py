"""`aapt import`: published weights into a checkpoint."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from aapt_deploy.cli import options as opt
from aapt_deploy.errors import UsageError, needs_extra

Weights = Annotated[
    Path, typer.Argument(help="Published generator: .pt, .safetensors or a folder.", metavar="FILE")
]
ImportPreset = Annotated[
    str | None, typer.Option("--preset", help="Shipped preset or TOML file of these weights.")
]
Vae = Annotated[Path | None, typer.Option(help="VAE of the preset's kind (Wan2.1_VAE.pth).")]
Taehv = Annotated[
    Path | None, typer.Option(help="The small VAE, for presets that have it (taew2_1.pth).")
]
Lora = Annotated[Path | None, typer.Option(help="LoRA to merge into the generator.")]
LoraAlpha = Annotated[
    float | None, typer.Option(help="The LoRA's alpha. Default: that of a published file.")
]
ImportOut = Annotated[Path, typer.Option("--out", "-o", help="Checkpoint to write.")]


def import_(
    weights: Weights,
    out: ImportOut = Path("imported.safetensors"),
    preset: ImportPreset = None,
    vae: Vae = None,
    taehv: Taehv = None,
    lora: Lora = None,
    lora_alpha: LoraAlpha = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
) -> None:
    """Turn published weights of a causal generator into a checkpoint, key by key.

    The result has the generator in bf16, its VAE, and the hashes of their files.
    """
    from aapt_deploy import profiles
    from aapt_deploy.cli import console

    with needs_extra("export"), console.steps(f"importing {weights}") as step:
        from aapt_deploy.export import import_ as work

        if preset is None:
            found = "; ".join(work.proposals(weights, step)) or "docs/deploy-wan.md lists them"
            raise UsageError(f"{weights} needs a --preset", found)
        profile = profiles.load(preset)
        named = {"": weights, "--vae": vae, "--taehv": taehv}
        files = {option: path for option, path in named.items() if path is not None}
        request = work.Request(files, lora, lora_alpha)
        done = work.import_checkpoint(request, profile, out, force, step)
    taken = f", from its {done.inside}" if done.inside else ""
    console.say(
        f"{out}: {done.parameters / 1e6:.1f} M parameters, {done.bytes / 1e6:.1f} MB{taken}"
    )
    if as_json:
        typer.echo(json.dumps({"checkpoint": str(out), **asdict(done)}))
