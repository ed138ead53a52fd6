"""Turn published weights into a checkpoint of ours: `aapt import`.

The family's key map says what becomes what. Missing, surplus and misshapen tensors are listed at
once, and nothing is written then. Tensors pass through memory one by one. Generators are stored in
bf16, as their authors run them; a VAE keeps its own number format.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aapt_deploy.backends.trial import Report
from aapt_deploy.bundle.files import refuse_irregular, whole, writing
from aapt_deploy.errors import CheckpointError, OutputError, UsageError
from aapt_deploy.export.foreign import Foreign, Lazy, open_foreign
from aapt_deploy.models import checkpoint, published
from aapt_deploy.models.checkpoint import FORMAT, LISTED, STORED
from aapt_deploy.models.family import family_of
from aapt_deploy.models.sources import Part, Source
from aapt_deploy.profiles import Profile

PARTS = ("generator.", "vae.")
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # of safetensors
LORA = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class Request:
    """What to import."""

    files: dict[str, Path]  # by option; "" for the generator
    lora: Path | None = None
    lora_alpha: float | None = None


@dataclass(frozen=True)
class Imported:
    """What was imported."""

    parameters: int
    bytes: int
    inside: str  # the dict of the file that was taken
    recognised: str  # the published file's title; "" if it is none that is known
    sources: dict[str, str]  # sha256 by file name


def import_checkpoint(
    request: Request, profile: Profile, out: Path, overwrite: bool, report: Report
) -> Imported:
    """Write the checkpoint `out` from published weights.

    Raises UsageError for a file that no preset can run, or a family without published weights.
    Raises CheckpointError if a file is damaged or does not fit the profile.
    Raises OutputError if `out` exists and `overwrite` is off, or cannot be written.
    """
    refuse_irregular(out)
    if out.exists() and not overwrite:
        raise OutputError(f"checkpoint {out} exists", "add --force to replace it")
    parts = family_of(profile).networks().parts(profile)
    if not parts:
        wrong = f"profile {profile.name} is of family {profile.family}, which has no import"
        raise UsageError(wrong, "its checkpoints are made by `aapt train` or `aapt init`")
    _refuse_options(request, parts, profile)
    report("opening the files")
    foreign = [open_foreign(request.files[part.option]) for part in parts]
    _refuse_published(foreign[0])
    files = [file for each in foreign for file in each.files]
    if request.lora is not None:
        lora = open_foreign(request.lora)
        files += lora.files
    digests = {_name(file, files): _sha256(file, report) for file in files}
    if request.lora is not None:
        foreign[0] = _merged(foreign[0], lora, _alpha(request, profile, request.lora))
    with torch.device("meta"):
        networks = checkpoint.build(profile)
    made = dict[str, tuple[torch.Size, Source, Foreign]]()
    for network, part, weights in zip(networks, parts, foreign, strict=True):
        shapes = {name: value.shape for name, value in network.state_dict().items()}
        _refuse_unfit(part, shapes, weights)
        rows = ((name, source) for name, source in part.sources.items())
        made |= {part.prefix + name: (shapes[name], source, weights) for name, source in rows}
    title = next((k.title for d in digests.values() for k in published.recognised(0, d)), "")
    origin = {"sources": digests, "inside": foreign[0].inside, "recognised": title}
    metadata = {
        "format": FORMAT, "profile": profile.dumps(), "start": "{}",
        "training": json.dumps({"stage": "imported", **origin}),
    }  # fmt: skip
    kinds = {name: _dtype(name, source, weights) for name, (_, source, weights) in made.items()}
    report(f"writing {out}")
    write_tensors(
        out, metadata, {name: (kinds[name], tuple(shape)) for name, (shape, _, _) in made.items()},
        lambda name: _made(name, *made[name][1:]).to(kinds[name]),
    )  # fmt: skip
    count = sum(shape.numel() for shape, _, _ in made.values())
    return Imported(count, out.stat().st_size, foreign[0].inside, title, digests)


def _refuse_options(request: Request, parts: list[Part], profile: Profile) -> None:
    """Raise UsageError unless every part's file is given, and no other."""
    wanted = {part.option: part for part in parts}
    for option, part in wanted.items():
        if option not in request.files:
            wrong = f"profile {profile.name} has vae.kind = {profile.vae.kind!r}"
            raise UsageError(wrong, f"add {option} {part.file}")
    for option, path in request.files.items():
        if option not in wanted:
            wrong = f"{option} {path} is not of vae.kind = {profile.vae.kind!r}"
            raise UsageError(wrong, f"leave {option} out, or take another preset")


def _name(path: Path, files: list[Path]) -> str:
    """Return the file's name, with its folder if another file has the same."""
    alone = [file.name for file in files].count(path.name) == 1
    return path.name if alone else f"{path.parent.name}/{path.name}"


def _sha256(path: Path, report: Report) -> str:
    report(f"hashing {path.name}")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_published(weights: Foreign) -> None:
    """Raise UsageError for weights that are known to need another generator."""
    why = published.refused(str(weights.path))
    channels = [lazy.shape[1] for name, lazy in weights.tensors.items() if "patch_emb" in name
                and len(lazy.shape) > 1]  # fmt: skip
    why = why or next((published.REFUSED_CHANNELS.get(c, "") for c in channels), "")
    if why:
        supported = ", ".join(dict.fromkeys(known.title for known in published.KNOWN))
        raise UsageError(f"weights {weights.path} are refused: {why}", f"supported: {supported}")


def _alpha(request: Request, profile: Profile, lora: Path) -> float:
    """Return the LoRA's alpha: given, or the preset's."""
    given = request.lora_alpha
    if (alpha := published.lora_alpha(profile.name) if given is None else given) is None:
        wrong = f"LoRA {lora} has no alpha inside, and profile {profile.name} sets none"
        raise UsageError(wrong, "add --lora-alpha; LongLive 1.0 was trained with 256")
    return alpha


def _merged(base: Foreign, lora: Foreign, alpha: float) -> Foreign:
    """Return `base` with W + alpha / rank B A in the place of every W that the LoRA adapts."""
    down, up = (
        {n.removesuffix(end): lazy for n, lazy in lora.tensors.items() if n.endswith(end)}
        for end in LORA
    )
    targets = {path: f"{path}.weight" for path in down}
    strange = [n for n in lora.tensors if not n.endswith(LORA)]
    strange += [
        path for path, name in targets.items() if path not in up or name not in base.tensors
    ]
    strange += sorted(up.keys() - down.keys())
    if strange or not down:
        listed = ", ".join(strange[:LISTED]) or "no lora_A and lora_B at all"
        wrong = f"LoRA {lora.path} does not fit {base.path}: {listed}"
        raise CheckpointError(wrong, "take the LoRA and the base of one release")

    def merge(path: str, weight: Lazy) -> Callable[[], Tensor]:
        def read() -> Tensor:
            a, b = down[path].read().float(), up[path].read().float()
            return weight.read().float() + alpha / a.shape[0] * (b @ a)

        return read

    tensors = dict(base.tensors)
    for path, name in targets.items():
        tensors[name] = Lazy(tensors[name].shape, merge(path, tensors[name]))
    return base._replace(tensors=tensors)


def _refuse_unfit(part: Part, shapes: dict[str, torch.Size], weights: Foreign) -> None:
    """Raise CheckpointError if the file's tensors are not those of the profile."""
    assert shapes.keys() == part.sources.keys(), shapes.keys() ^ part.sources.keys()
    wanted = {
        theirs: source.shape(tuple(shapes[ours]))
        for ours, source in part.sources.items()
        for theirs in source.theirs
    }
    there = weights.tensors
    surplus = sorted(n for n in there.keys() - wanted.keys() if not n.startswith(part.unused))
    problems = {
        "missing": sorted(wanted.keys() - there.keys()),
        "surplus": surplus,
        "misshapen": [
            f"{name} {list(there[name].shape)} instead of {list(shape)}"
            for name, shape in wanted.items()
            if name in there and there[name].shape != shape
        ],
    }
    found = []
    for kind, names in problems.items():
        listed = ", ".join(names[:LISTED] + ["…"] * (len(names) > LISTED))
        found += [f"{len(names)} {kind}: {listed}"] if names else []
    if found:
        unfit = f"weights {weights.path} do not fit the profile: {'; '.join(found)}"
        raise CheckpointError(unfit, "take the preset of this file, or the file of this preset")


def _dtype(name: str, source: Source, weights: Foreign) -> torch.dtype:
    if name.startswith(PARTS[0]):
        return torch.bfloat16
    own = weights.tensors[source.theirs[0]].read().dtype
    return own if own in STORED else torch.float32


def _made(name: str, source: Source, weights: Foreign) -> Tensor:
    value = source.make(*(weights.tensors[theirs].read() for theirs in source.theirs))
    if not torch.isfinite(value).all():
        wrong = f"weights {weights.path}: {', '.join(source.theirs)} are not finite"
        raise CheckpointError(wrong, "download the file again, and check its hash")
    return value


def write_tensors(
    path: Path, metadata: dict[str, str], kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], Tensor],
) -> None:  # fmt: skip
    """Write a safetensors file tensor by tensor, whole or not at all.

    The library's own writer wants all tensors in memory. Format: a header's length (uint64, little
    endian), the header in JSON, then the bytes in its order.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape) in kinds.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    hint = "name a file in a folder that exists, with room for it"
    with (
        writing(f"checkpoint {path}", hint),
        whole(path) as temporary,
        temporary.open("wb") as file,
    ):
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (dtype, shape) in kinds.items():
            value = read(name)
            assert (value.dtype, tuple(value.shape)) == (dtype, shape), f"{name} {value.shape}"
            value.contiguous().reshape(-1).view(torch.uint8).numpy().tofile(file)


def proposals(path: Path, report: Report) -> Iterator[str]:
    """Yield the presets of the published files that the file at `path` may be."""
    if not path.is_file():
        return
    known = published.recognised(path.stat().st_size, _sha256(path, report))
    yield from dict.fromkeys(f"{k.title}: --preset {k.preset}" for k in known)
