"""Check that checkpoints load as saved, and that a bad file raises one CheckpointError."""

import json
import os
import pickle
import resource
import struct
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from aapt_deploy.errors import CheckpointError, InputError, OutputError, ProfileError
from aapt_deploy.models.checkpoint import FORMAT, LISTED, StartFrame, build, load, save, stored
from aapt_deploy.profiles import load as load_profile

TINY = load_profile("tiny-cpu")
IMAGE = torch.arange(32 * 64 * 3).remainder(251).to(torch.uint8).reshape(32, 64, 3)
START = {
    "forest-dusk": StartFrame(IMAGE, "a forest at dusk"),
    "sea": StartFrame(255 - IMAGE, "islands"),
}
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint with random weights."""
    torch.manual_seed(0)
    generator, vae = build(TINY)
    with torch.no_grad():
        for p in (*generator.parameters(), *vae.parameters()):
            p.copy_(torch.randn(p.shape))
    path = tmp_path_factory.mktemp("good") / "tiny.safetensors"
    save(path, TINY, generator, vae, {"seed": 0}, START)
    return path


def parts(path: Path) -> tuple[Tensors, dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, file.metadata()


def refusal(path: Path, sha256: str | None = None) -> str:
    """The message of the CheckpointError that `path` meets."""
    with pytest.raises(CheckpointError) as caught:
        load(path, sha256)
    assert caught.value.exit_code == 4
    assert caught.value.hint
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- what is saved is what is loaded ---


def test_round_trip(good: Path) -> None:
    checkpoint = load(good)
    assert checkpoint.profile == TINY
    assert checkpoint.path == good
    assert checkpoint.sha256 == sha256(good.read_bytes()).hexdigest()
    torch.manual_seed(0)
    generator, vae = build(TINY)
    for module, loaded in ((generator, checkpoint.generator), (vae, checkpoint.vae)):
        assert not loaded.training
        names = [name for name, _ in module.named_parameters()]
        assert [name for name, _ in loaded.named_parameters()] == names
        for p in loaded.parameters():
            assert p.dtype == torch.float32
            assert torch.equal(
                p, torch.randn(p.shape).half().float()
            )  # the draws of the fixture, in its order
    frames = checkpoint.start_frames
    prompts = {"forest-dusk": "a forest at dusk", "sea": "islands"}
    assert {name: frame.prompt for name, frame in frames.items()} == prompts
    assert all(torch.equal(frame.image, START[name].image) for name, frame in frames.items())


def test_a_second_save_of_a_loaded_checkpoint_holds_the_same(good: Path, tmp_path: Path) -> None:
    first, again = load(good), tmp_path / "again.safetensors"
    save(again, first.profile, first.generator, first.vae, {"seed": 0}, first.start_frames)
    (tensors, metadata), (wanted, described) = parts(again), parts(good)
    assert metadata == described
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert [path.name for path in tmp_path.iterdir()] == [
        "again.safetensors"
    ]  # nothing temporary is left


def test_training_notes_are_kept(good: Path) -> None:
    assert json.loads(parts(good)[1]["training"]) == {"seed": 0}


def test_weights_in_float32_are_loaded_as_they_are(good: Path, tmp_path: Path) -> None:
    tensors, metadata = parts(good)
    exact = torch.full_like(tensors["generator.visual_in.bias"], 1 + 2**-20, dtype=torch.float32)
    save_file({**tensors, "generator.visual_in.bias": exact}, tmp_path / "x.safetensors", metadata)
    assert torch.equal(load(tmp_path / "x.safetensors").generator.visual_in.bias, exact)


def test_a_failed_save_is_told_and_leaves_the_old_file(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(good.read_bytes())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for target, most in (
        (path, 100_000),
        (tmp_path / "no-such-folder" / "x.safetensors", limits[0]),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))  # as a disk that fills up
        try:
            with pytest.raises(OutputError, match=f"{target} cannot be written") as caught:
                save(target, TINY, *build(TINY), {}, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.exit_code == 6
        assert caught.value.hint
    assert path.read_bytes() == good.read_bytes()
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_save_touches_nothing_of_the_users_but_the_file_it_is_told_to(tmp_path: Path) -> None:
    (tmp_path / "x.tmp").write_text("mine")
    save(tmp_path / "x.safetensors", TINY, *build(TINY), {}, {})
    assert sorted(os.listdir(tmp_path)) == ["x.safetensors", "x.tmp"]
    assert (tmp_path / "x.tmp").read_text() == "mine"


def test_a_save_replaces_a_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to-the-pipe").symlink_to("pipe")
    before = sorted(os.listdir(tmp_path))
    for name in before:
        with pytest.raises(OutputError, match=f"{name} exists and is not a regular file"):
            save(tmp_path / name, TINY, *build(TINY), {}, {})
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "to-the-pipe").is_symlink()
    assert os.listdir(tmp_path / "folder") == []


def test_a_link_stays_a_link_and_permissions_follow_the_umask(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "x.safetensors"
    link.symlink_to("disk/real.safetensors")
    before = os.umask(0o027)
    try:
        for _ in range(2):  # made, and replaced
            save(link, TINY, *build(TINY), {}, {})
            assert link.is_symlink() and os.listdir(tmp_path / "disk") == ["real.safetensors"]
            assert (tmp_path / "disk" / "real.safetensors").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)
    assert load(link).profile == TINY


# --- damaged files ---


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1, -1000])
def test_a_truncated_file(good: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(good.read_bytes()[:kept])
    assert "not a readable safetensors file" in refusal(path)


@pytest.mark.parametrize("where", [-1, -20_000, 12, 500])
def test_a_flipped_bit_is_found_by_the_hash(good: Path, tmp_path: Path, where: int) -> None:
    data, path = bytearray(good.read_bytes()), tmp_path / "x.safetensors"
    whole = sha256(data).hexdigest()
    data[where] ^= 4
    path.write_bytes(data)
    message = refusal(path, whole)
    assert whole in message
    assert sha256(data).hexdigest() in message


def test_no_flipped_bit_ends_in_a_traceback(good: Path, tmp_path: Path) -> None:
    """Without an expected hash, a flip in a weight may pass; one in the header must not harm."""
    data, path = good.read_bytes(), tmp_path / "x.safetensors"
    header = 8 + struct.unpack("<Q", data[:8])[0]
    refused = 0
    for where in [*range(8), *range(8, header, 97)]:
        for bit in (0, 5):
            path.write_bytes(data[:where] + bytes([data[where] ^ 1 << bit]) + data[where + 1 :])
            try:
                load(path)
            except InputError:  # and nothing else
                refused += 1
    assert refused > header / 97


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 100_000_001])
def test_a_header_that_claims_to_be_huge(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path.write_bytes(struct.pack("<Q", length) + header + bytes(64))
    assert "not a readable safetensors file" in refusal(path)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4000000000]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
        b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"[" * 4000,
        b'{"__metadata__":{"format":7}}',
        b"\xff\xfe\xfd",
        b"{}",
    ],
)
def test_a_header_that_lies(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refusal(path)


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_a_renamed_pickle_is_not_opened(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    save = lambda path: torch.save(Trap(sprung), path)
    dump = lambda path: path.write_bytes(pickle.dumps(Trap(sprung)))
    for name, write in (("a", save), ("b", dump)):
        path = tmp_path / f"{name}.safetensors"
        write(path)
        assert "not a readable safetensors file" in refusal(path)
    assert not sprung.exists()


def test_other_things_than_files(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.safetensors")
    assert "directory" in refusal(tmp_path)


def test_another_format(good: Path, tmp_path: Path) -> None:
    tensors, metadata = parts(good)
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    assert f"not of format {FORMAT}: no format entry" in refusal(path)
    save_file(tensors, path, {**metadata, "format": "aapt-checkpoint-9"})
    assert "aapt-checkpoint-9" in refusal(path)
    save_file(tensors, path, {"format": FORMAT})
    assert FORMAT in refusal(path)


def test_a_profile_with_unknown_keys_inside(good: Path, tmp_path: Path) -> None:
    tensors, metadata = parts(good)
    path = tmp_path / "x.safetensors"
    profile = metadata["profile"].replace("depth = 2", "depth = 2\nexperts = 8")
    save_file(tensors, path, {**metadata, "profile": profile})
    with pytest.raises(ProfileError, match=r"unknown key 'model\.experts'") as caught:
        load(path)
    assert caught.value.exit_code == 4
    assert str(path) in str(caught.value)


# --- tensors that do not fit ---


def test_everything_wrong_with_the_tensors_is_listed_at_once(good: Path, tmp_path: Path) -> None:
    tensors, metadata = parts(good)
    path = tmp_path / "x.safetensors"
    del tensors["generator.visual_in.weight"], tensors["vae.decoder.inlet.conv.bias"]
    tensors["generator.visual_in.bias"] = torch.zeros(1, 32)
    tensors["generator.time_out.bias"][3] = torch.nan
    tensors["vae.encoder.linear.conv.bias"] = torch.tensor(
        [torch.inf, 0, 0, 0], dtype=torch.float16
    )
    tensors["generator.text_in.bias"] = tensors["generator.text_in.bias"].to(torch.int8)
    tensors["optimizer.step"] = torch.zeros(1)
    save_file(tensors, path, metadata)
    message = refusal(path)
    for part in (
        "2 missing: generator.visual_in.weight, vae.decoder.inlet.conv.bias",
        "1 surplus: optimizer.step",
        "1 misshapen: generator.visual_in.bias [1, 32] instead of [32]",
        "1 mistyped: generator.text_in.bias torch.int8",
        "2 not finite: generator.time_out.bias, vae.encoder.linear.conv.bias",
    ):
        assert part in message


def test_a_long_list_is_cut_and_counted(good: Path, tmp_path: Path) -> None:
    tensors, metadata = parts(good)
    path = tmp_path / "x.safetensors"
    save_file(
        {name: t for name, t in tensors.items() if not name.startswith("generator.")},
        path,
        metadata,
    )
    message = refusal(path)
    missing = sum(name.startswith("generator.") for name in tensors)
    assert f"{missing} missing: " in message
    assert message.count("generator.") == LISTED
    assert message.endswith("…")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32, torch.bool, torch.complex64])
def test_weights_of_a_strange_type_are_refused(
    good: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors, metadata = parts(good)
    path = tmp_path / "x.safetensors"
    save_file({**tensors, "generator.visual_in.bias": torch.zeros(32, dtype=dtype)}, path, metadata)
    assert f"1 mistyped: generator.visual_in.bias {dtype}" in refusal(path)


# --- start frames ---


@pytest.mark.parametrize(
    "start", ["{", "[1, 2]", '{"sea": "islands", "nowhere": "islands"}', "[" * 100_000]
)
def test_a_damaged_list_of_start_frames(good: Path, tmp_path: Path, start: str) -> None:
    tensors, metadata = parts(good)
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {**metadata, "start": start})
    assert "damaged list of start frames" in refusal(path)


def test_a_start_frame_that_is_no_picture_of_this_size(good: Path, tmp_path: Path) -> None:
    tensors, metadata = parts(good)
    path = tmp_path / "x.safetensors"
    for image in (IMAGE[:16], IMAGE.float(), IMAGE[..., 0]):
        save_file({**tensors, "start.sea": image.contiguous()}, path, metadata)
        assert "start frame 'sea' is" in refusal(path)


@pytest.mark.parametrize("name", ["../evil", "A", "", "x" * 41, "a/b"])
def test_a_start_frame_with_a_name_that_is_no_word(good: Path, tmp_path: Path, name: str) -> None:
    tensors, metadata = parts(good)
    path = tmp_path / "x.safetensors"
    starts = json.dumps({"sea": "x", "forest-dusk": "y", name: "z"})
    save_file({**tensors, f"start.{name}": IMAGE}, path, {**metadata, "start": starts})
    assert "start frame" in refusal(path)


def test_a_start_frame_that_is_not_listed_is_surplus(good: Path, tmp_path: Path) -> None:
    tensors, metadata = parts(good)
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {**metadata, "start": "{}"})
    assert "2 surplus: start.forest-dusk, start.sea" in refusal(path)


def test_no_start_frames_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(path, TINY, *build(TINY), {}, {})
    assert load(path).start_frames == {}


def test_a_weight_of_a_file_that_is_gone_or_lacks_it_cannot_be_read(
    good: Path, tmp_path: Path
) -> None:
    path = tmp_path / "copy.safetensors"
    path.write_bytes(good.read_bytes())
    held = stored(path)
    name = "generator.text_in.weight"
    weight = held.tensor(name)
    assert weight.dtype == torch.float32 and torch.equal(weight, parts(good)[0][name].float())
    with pytest.raises(CheckpointError, match=f"^checkpoint {path} cannot be read any more: "):
        held.tensor("generator.nothing")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read any more: .*No such file") as caught:
        held.tensor(name)
    assert caught.value.hint == "leave the file alone while it is in use"
