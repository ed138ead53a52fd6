"""Published weights in every layout that is found, and the files that are refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from aapt_deploy import profiles
from aapt_deploy.errors import AaptError, CheckpointError, OutputError, UsageError
from aapt_deploy.export import import_
from aapt_deploy.export.import_ import Imported, Request, import_checkpoint
from aapt_deploy.models import checkpoint, published
from aapt_deploy.profiles import Profile
from tests.support import wan
from tests.support.commands import Ran

TINY = profiles.load("wan-tiny-cpu")
MICRO = TINY.replace(
    model=dataclasses.replace(TINY.model, dim=24, ffn=40, depth=1),
    text=dataclasses.replace(TINY.text, tokens=16, dim=32),
)
VAE = wan.FOLDER / "weights-vae-tiny.safetensors"
BASE = wan.FOLDER / "ckpt-wan-base.safetensors"


def imported(
    path: Path, out: Path, lora: Path | None = None, alpha: float | None = None
) -> tuple[Imported, dict[str, Tensor]]:
    request = Request({"": path, "--vae": VAE}, lora, alpha)
    done = import_checkpoint(request, MICRO, out, False, lambda text: None)
    return done, load_file(out)


def refusal(
    request: Request, out: Path, kind: type[AaptError], profile: Profile = MICRO
) -> AaptError:
    with pytest.raises(kind) as caught:
        import_checkpoint(request, profile, out, False, lambda text: None)
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))
    assert caught.value.hint
    return caught.value


def sharded(folder: Path, index: bool) -> Path:
    """The base in two files."""
    weights = load_file(BASE)
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    folder.mkdir()
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, folder / file)
    if index:
        place = {name: file for file, part in shards.items() for name in part}
        text = json.dumps({"weight_map": place})
        (folder / "model.safetensors.index.json").write_text(text)
        save_file({"other": torch.zeros(1)}, folder / "c.safetensors")
    return folder


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "Self-Forcing": lambda folder: wan.FOLDER / "ckpt-self-forcing.pt",
    "FSDP": lambda folder: wan.FOLDER / "ckpt-fsdp-prefix.pt",
    "CausVid": lambda folder: wan.FOLDER / "ckpt-causvid.pt",
    "an index": lambda folder: sharded(folder / "x", True),
    "a folder": lambda folder: sharded(folder / "x", False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_become_the_same_weights(layout: str, tmp_path: Path) -> None:
    _, base = imported(BASE, tmp_path / "base.safetensors")
    done, found = imported(LAYOUTS[layout](tmp_path), tmp_path / "other.safetensors")
    assert found.keys() == base.keys()
    assert all(torch.equal(found[name], base[name]) for name in base)
    assert done.parameters == sum(x.numel() for x in base.values())
    inside = {"Self-Forcing": "generator_ema", "FSDP": "generator_ema", "CausVid": "generator"}
    assert done.inside == inside.get(layout, "")


def test_a_lora_is_merged_as_peft_does(tmp_path: Path) -> None:
    lora = wan.FOLDER / "ckpt-longlive-lora.pt"
    _, ours = imported(BASE, tmp_path / "ours.safetensors", lora, 8)
    _, peft = imported(
        wan.FOLDER / "ckpt-longlive-merged.safetensors", tmp_path / "peft.safetensors"
    )
    _, base = imported(BASE, tmp_path / "base.safetensors")
    for name in base:  # bf16 has 8 bits
        torch.testing.assert_close(ours[name], peft[name], rtol=2**-8, atol=0)
    changed = [name for name in base if not torch.equal(ours[name], base[name])]
    assert {name.split(".")[3] for name in changed} == {
        "qkv", "out", "text_q", "text_k", "text_v", "text_out", "w1", "w2",
    }  # fmt: skip
    with pytest.raises(UsageError, match="has no alpha inside") as caught:
        imported(BASE, tmp_path / "none.safetensors", lora)
    assert "--lora-alpha" in caught.value.hint


def test_a_checkpoint_describes_itself_and_loads(tmp_path: Path) -> None:
    out = tmp_path / "made.safetensors"
    done, tensors = imported(BASE, out)
    loaded = checkpoint.load(out)
    assert loaded.profile == MICRO
    kinds = {name: value.dtype for name, value in tensors.items()}
    assert {kinds[name] for name in kinds if name.startswith("generator.")} == {torch.bfloat16}
    with safe_open(out, framework="pt") as file:
        training = json.loads(file.metadata()["training"])
    assert training["stage"] == "imported" and training["sources"] == done.sources
    assert done.sources[BASE.name] == import_._sha256(BASE, lambda text: None)
    assert done.bytes == out.stat().st_size and done.recognised == ""


def test_a_vae_keeps_its_number_format(tmp_path: Path) -> None:
    wide = tmp_path / "vae.safetensors"
    save_file({name: value.float() for name, value in load_file(VAE).items()}, wide)
    out = tmp_path / "out.safetensors"
    request = Request({"": BASE, "--vae": wide})
    import_checkpoint(request, MICRO, out, False, lambda text: None)
    kinds = {name.split(".")[0]: value.dtype for name, value in load_file(out).items()}
    assert kinds == {"generator": torch.bfloat16, "vae": torch.float32}


def changed(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    weights = load_file(BASE)
    change(weights)
    save_file(weights, folder / "changed.safetensors")
    return folder / "changed.safetensors"


def test_missing_surplus_and_misshapen_tensors_are_listed_together(tmp_path: Path) -> None:
    def spoil(weights: dict[str, Tensor]) -> None:
        del weights["blocks.0.ffn.0.bias"]
        weights["blocks.1.ffn.0.bias"] = torch.zeros(3)
        weights["head.head.bias"] = torch.zeros(5)

    request = Request({"": changed(tmp_path, spoil), "--vae": VAE})
    message = str(refusal(request, tmp_path / "out", CheckpointError))
    for part in (
        "1 missing: blocks.0.ffn.0.bias", "1 surplus: blocks.1.ffn.0.bias",
        "1 misshapen: head.head.bias [5] instead of [64]",
    ):  # fmt: skip
        assert part in message


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda weights: weights["head.head.bias"].fill_(torch.nan))
    error = refusal(Request({"": path, "--vae": VAE}), tmp_path / "out", CheckpointError)
    assert "head.head.bias are not finite" in str(error)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("rolling_forcing_dmd.pt", "five blocks at five noise levels"),
        ("chunkwise/longvideo.pt", "Rolling Forcing's sampler"),
        ("rewardforcing.pt", "moving average"),
        ("krea-realtime-video-14b.safetensors", "computes its cache again"),
        ("Wan2.2-TI2V-5B/x.safetensors", "48 channels"),
    ],
)
def test_files_that_no_preset_can_run_are_refused_by_name(
    name: str, why: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((wan.FOLDER / "ckpt-causvid.pt").read_bytes())
    if path.suffix == ".safetensors":
        path.write_bytes(BASE.read_bytes())
    error = refusal(Request({"": path, "--vae": VAE}), tmp_path / "out", UsageError)
    assert why in str(error) and "Self-Forcing" in error.hint


@pytest.mark.parametrize(("channels", "why"), [(36, "36 input channels"), (48, "48 channels")])
def test_weights_of_other_latents_are_refused(channels: int, why: str, tmp_path: Path) -> None:
    def widen(weights: dict[str, Tensor]) -> None:
        weights["patch_embedding.weight"] = torch.zeros(24, channels, 1, 2, 2)

    request = Request({"": changed(tmp_path, widen), "--vae": VAE})
    assert why in str(refusal(request, tmp_path / "out", UsageError))


def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    text = json.dumps({"weight_map": {"a": "../base.safetensors"}})
    (folder / "model.safetensors.index.json").write_text(text)
    error = refusal(Request({"": folder, "--vae": VAE}), tmp_path / "out", CheckpointError)
    assert "outside its folder" in str(error)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("unpickled",)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"generator": Evil()}, "more than tensors"),
        ({"generator": {"x": 3}}, "no tensors by name: generator"),
        ([torch.zeros(1)], "no tensors by name: list"),
    ],
)
def test_a_file_of_other_things_is_refused_and_not_run(
    content: object, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.pt"
    torch.save(content, path)
    error = refusal(Request({"": path, "--vae": VAE}), tmp_path / "out", CheckpointError)
    assert problem in str(error)
    assert "unpickled" not in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x"])
def test_a_damaged_or_missing_file_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    request = Request({"": path, "--vae": VAE})
    assert str(path) in str(refusal(request, tmp_path / "out", CheckpointError))
    path.write_bytes(b"nothing of use" * 9)
    assert str(path) in str(refusal(request, tmp_path / "out", CheckpointError))


def test_files_of_another_vae_and_another_family_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "add --vae Wan2.1_VAE.pth" in refusal(Request({"": BASE}), out, UsageError).hint
    both = Request({"": BASE, "--vae": VAE, "--taehv": VAE})
    assert "leave --taehv out" in refusal(both, out, UsageError).hint
    aapt = profiles.load("tiny-cpu")
    assert "aapt init" in refusal(both, out, UsageError, aapt).hint


def test_an_existing_checkpoint_stays_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"mine")
    request = Request({"": BASE, "--vae": VAE})
    with pytest.raises(OutputError, match="exists"):
        import_checkpoint(request, MICRO, out, False, lambda text: None)
    assert out.read_bytes() == b"mine"
    import_checkpoint(request, MICRO, out, True, lambda text: None)
    assert checkpoint.stored(out).profile == MICRO


def test_published_files_are_recognised() -> None:
    assert [k.title for k in published.recognised(0, "bdb1b475" + "0" * 56)] == [
        "Causal-Forcing++ 1-step"
    ]
    assert published.recognised(5_676_220_819, "0" * 64) == []
    assert published.refused("/x/self_forcing_dmd.pt") == ""
    assert published.lora_alpha("longlive-832x480-h100") == 256
    assert published.lora_alpha("wan-tiny-cpu") is None


def test_the_command(aapt: Callable[..., Ran], tmp_path: Path) -> None:
    preset, out = tmp_path / "micro.toml", tmp_path / "out.safetensors"
    preset.write_text(MICRO.dumps())
    ran = aapt("import", BASE, "-o", out, "--preset", preset, "--vae", VAE, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["parameters"] == sum(x.numel() for x in load_file(out).values())
    ran = aapt("import", BASE, "-o", out, "--vae", VAE)
    assert ran.code == 2 and "needs a --preset" in ran.err
