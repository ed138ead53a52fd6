"""`aapt import` and `aapt prompt`: published weights and words, into what the others take."""

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
Prompts = Annotated[list[str], typer.Argument(help="What the video shows.", metavar="PROMPT...")]
EncoderFolder = Annotated[
    Path, typer.Option("--encoder", help="Folder of the text encoder and its tokenizer.")
]
PromptOut = Annotated[Path, typer.Option("--out", "-o", help="File, or folder, to write.")]
Tokens = Annotated[int, typer.Option(min=2, help="Length of the vectors: the profile's.")]
TextPrecision = Annotated[
    str, typer.Option("--precision", help="bf16, or fp32 for twice the memory.")
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


def prompt(
    prompts: Prompts,
    encoder: EncoderFolder,
    out: PromptOut = Path("prompt.npy"),
    tokens: Tokens = 512,
    precision: TextPrecision = "bf16",
    as_json: opt.Json = False,
) -> None:
    """Turn prompts into vectors of a text encoder, for `aapt stream --prompt`.

    One prompt becomes the file --out. Several become 00.npy, 01.npy, ... in the folder --out.
    """
    from aapt_deploy.cli import console

    with needs_extra("text"), console.steps("encoding prompts") as step:
        from aapt_deploy.export import text_encoder

        made = text_encoder.encode(prompts, encoder, tokens, precision, step)
        names = [out / f"{i:02d}.npy" for i in range(len(made))] if len(made) > 1 else [out]
        text_encoder.copy(made, names)
    for text, name in zip(prompts, names, strict=True):
        console.say(f"{name}: {text}")
    if as_json:
        typer.echo(json.dumps({str(name): t for t, name in zip(prompts, names, strict=True)}))
