"""Test clips on disk: rendering resumes, videos become clips.

Broken clips are skipped and named.
"""

import dataclasses
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from aapt_deploy.errors import InputError, OutputError
from aapt_deploy.models.aapt.camera import Pose, condition_map
from aapt_deploy.models.aapt.prompts import PROMPT_TOKENS, Look, token_ids
from aapt_deploy.profiles import load
from aapt_deploy.train.world import data as clip_data
from aapt_deploy.train.world.data import (
    FLIGHTS,
    ClipFile,
    clip_files,
    conditions,
    import_videos,
    render_world,
    render_worlds,
    write_clip,
)

TINY = load("tiny-cpu")
WIDTH, HEIGHT = TINY.video.width, TINY.video.height
BLOCKS = 2
Skipped = list[tuple[str, str]]


def unexpected(path: Path, reason: str) -> None:
    pytest.fail(f"{path} was skipped: {reason}")


def noting(skipped: Skipped) -> Callable[[Path, str], None]:
    return lambda path, reason: skipped.append((path.name, reason))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the clips of one world."""
    folder = tmp_path_factory.mktemp("rendered")
    assert render_world(folder, TINY, 7, BLOCKS) == FLIGHTS
    return folder


def arrays(blocks: int = BLOCKS) -> dict[str, np.ndarray]:
    """A clip that fits the profile."""
    frames = np.random.default_rng(0).integers(0, 256, (1 + 4 * blocks, HEIGHT, WIDTH, 3), np.uint8)
    return {"frames": frames, "poses": np.zeros((blocks + 1, 5)), "tokens": token_ids(Look())[0]}


# --- rendering ---


def test_rendered_clips_are_read_back(rendered: Path) -> None:
    files = clip_files(rendered, unexpected)
    assert [file.path.name for file in files] == [
        "clip-00000007-0.safetensors",
        "clip-00000007-1.safetensors",
    ]
    for file in files:
        clip = file.read(TINY)
        assert clip is not None
        assert clip["frames"].shape == (1 + 4 * BLOCKS, HEIGHT, WIDTH, 3)
        assert clip["frames"].dtype == np.uint8
        assert clip["frames"].std() > 5
        assert (clip["poses"].shape, clip["poses"].dtype) == ((BLOCKS + 1, 5), np.float64)
        assert np.ptp(clip["poses"][:, :2], axis=0).max() > 0.1
        assert (clip["tokens"].shape, clip["tokens"].dtype) == ((PROMPT_TOKENS,), np.int64)
        assert not set(clip["tokens"].tolist()) & {
            0,
            5,
            10,
            15,
        }  # a rendered world leaves no attribute open
    assert len({path.read_bytes() for path in rendered.iterdir()}) == FLIGHTS


def test_conditions_follow_the_poses(rendered: Path) -> None:
    clip = load_file(rendered / "clip-00000007-0.safetensors")
    maps = conditions(TINY, clip["poses"])
    assert (maps.shape, maps.dtype) == (
        (BLOCKS, 6, TINY.latent_height, TINY.latent_width),
        np.float32,
    )
    for block in range(BLOCKS):
        assert np.array_equal(
            maps[block],
            condition_map(TINY, *(Pose(*clip["poses"][i]) for i in (block, block + 1)))[0],
        )
    assert not conditions(TINY, np.zeros((3, 5))).any()


def test_rendering_resumes(rendered: Path, tmp_path: Path) -> None:
    first, second = "clip-00000007-0.safetensors", "clip-00000007-1.safetensors"
    save_file(arrays(), tmp_path / first)  # would be overwritten by a second rendering
    save_file(arrays(), tmp_path / second)
    mine = contents(tmp_path)
    assert render_world(tmp_path, TINY, 7, BLOCKS) == 0
    assert contents(tmp_path) == mine
    (tmp_path / first).unlink()
    assert render_world(tmp_path, TINY, 7, BLOCKS) == FLIGHTS
    for name in (first, second):  # an interrupted world comes out as an unbroken one
        resumed, unbroken = load_file(tmp_path / name), load_file(rendered / name)
        assert all(np.array_equal(resumed[key], unbroken[key]) for key in unbroken)
    assert sorted(contents(tmp_path)) == [first, second]


@pytest.mark.parametrize(
    "size",
    [(WIDTH, HEIGHT, BLOCKS + 1), (WIDTH // 2, HEIGHT, BLOCKS), (WIDTH, HEIGHT // 2, BLOCKS)],
)
def test_clips_of_another_length_or_size_are_rendered_again(
    rendered: Path, tmp_path: Path, size: tuple[int, int, int]
) -> None:
    """And those only: a folder that is rendered twice in one size is rendered once."""
    width, height, blocks = size
    other = dataclasses.replace(
        TINY, video=dataclasses.replace(TINY.video, width=width, height=height)
    )
    for name, data in contents(rendered).items():
        (tmp_path / name).write_bytes(data)
    assert render_world(tmp_path, other, 7, blocks) == FLIGHTS
    clips = [load_file(path) for path in tmp_path.iterdir()]
    assert [clip["frames"].shape for clip in clips] == [
        (1 + 4 * blocks, height, width, 3)
    ] * FLIGHTS
    assert render_world(tmp_path, other, 7, blocks) == 0


def test_many_worlds_are_rendered_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    assert list(render_worlds(folder, TINY, 3, 2, processes=1, blocks=1)) == [FLIGHTS, FLIGHTS]
    assert sorted(contents(folder)) == [
        f"clip-{seed:08d}-{flight}.safetensors" for seed in (3, 4) for flight in range(FLIGHTS)
    ]
    assert list(render_worlds(folder, TINY, 3, 2, processes=1, blocks=1)) == [0, 0]


def test_worlds_are_rendered_by_several_processes(tmp_path: Path) -> None:
    small = dataclasses.replace(TINY, video=dataclasses.replace(TINY.video, width=16, height=16))
    assert list(render_worlds(tmp_path, small, 0, 1, processes=2)) == [FLIGHTS]
    assert all(file.read(small) is not None for file in clip_files(tmp_path, unexpected))


def test_a_clip_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "clip-00000000-0.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_clip(path, **arrays())
    assert not path.exists()
    write_clip(path, **arrays())
    assert [file.path for file in clip_files(tmp_path, unexpected)] == [
        path
    ]  # what the killed run left is no clip


# --- broken clips ---


def broken_clips() -> dict[str, Callable[[Path], None]]:
    def saved(**changed: np.ndarray | None) -> Callable[[Path], None]:
        whole = {**arrays(), **changed}
        return lambda path: save_file(
            {name: array for name, array in whole.items() if array is not None}, path
        )

    def cut(path: Path) -> None:
        save_file(arrays(), path)
        path.write_bytes(path.read_bytes()[:-100])

    return {
        "cut": cut,
        "empty": lambda path: path.write_bytes(b""),
        "garbage": lambda path: path.write_bytes(b"\x07garbage" * 50),
        "folder": Path.mkdir,
        "no-poses": saved(poses=None),
        "no-tokens": saved(tokens=None),
        "narrow": saved(frames=arrays()["frames"][:, :, :-8]),
        "grey": saved(frames=arrays()["frames"][..., 0]),
        "short": saved(frames=arrays()["frames"][:-1]),
        "float": saved(frames=arrays()["frames"].astype(np.float32)),
        "one-frame": saved(frames=arrays()["frames"][:1], poses=np.zeros((1, 5))),
        "flat-poses": saved(poses=np.zeros(3)),
        "scalar-poses": saved(poses=np.array(3.0)),
        "small-poses": saved(poses=np.zeros((BLOCKS + 1, 4))),
        "nan-poses": saved(poses=np.full((BLOCKS + 1, 5), np.nan)),
        "long-tokens": saved(tokens=np.zeros(9, np.int64)),
    }


@pytest.mark.parametrize("kind", sorted(broken_clips().keys() - {"folder", "nan-poses"}))
def test_a_broken_clip_is_rendered_again(kind: str, rendered: Path, tmp_path: Path) -> None:
    """By its header, so bad numbers pass; a folder of that name is its owner's."""
    for name, data in contents(rendered).items():
        (tmp_path / name).write_bytes(data)
    path = tmp_path / "clip-00000007-0.safetensors"
    path.unlink()
    broken_clips()[kind](path)
    assert render_world(tmp_path, TINY, 7, BLOCKS) == FLIGHTS
    assert np.array_equal(load_file(path)["frames"], load_file(rendered / path.name)["frames"])


@pytest.mark.parametrize("kind", broken_clips())
def test_a_broken_clip_is_skipped_once_and_named(kind: str, tmp_path: Path) -> None:
    path, skipped = tmp_path / f"clip-{kind}.safetensors", Skipped()
    broken_clips()[kind](path)
    assert ClipFile(path, noting(skipped)).read(TINY) is None
    assert len(skipped) == 1
    assert skipped[0][0] == path.name
    assert len(skipped[0][1]) > 5


def test_loading_goes_on_after_broken_clips(rendered: Path, tmp_path: Path) -> None:
    for name, data in contents(rendered).items():
        (tmp_path / name).write_bytes(data)
    for kind, write in broken_clips().items():
        write(tmp_path / f"clip-{kind}.safetensors")
    skipped = Skipped()
    read = [file.read(TINY) for file in clip_files(tmp_path, noting(skipped))]
    assert sum(clip is not None for clip in read) == FLIGHTS
    assert sorted(name for name, _ in skipped) == sorted(
        f"clip-{kind}.safetensors" for kind in broken_clips()
    )


def test_clips_of_another_profile_are_skipped_with_both_sizes(rendered: Path) -> None:
    skipped = Skipped()
    assert [file.read(load("demo-cpu")) for file in clip_files(rendered, noting(skipped))] == [
        None,
        None,
    ]
    assert all("(9, 32, 64, 3)" in reason and "192x112" in reason for _, reason in skipped)


def test_a_folder_without_clips_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="holds no clip") as caught:
            clip_files(folder, unexpected)
        assert caught.value.hint


# --- a user's videos ---


def make_video(path: Path, frames: int) -> None:
    """A video in the profile's size and rate: noise whose brightness rises by 4 a frame."""
    noise = np.random.default_rng(0).integers(-8, 9, (frames, HEIGHT, WIDTH, 1))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"crf": "1", "threads": "1"}
        for i in range(frames):
            picture = np.broadcast_to(20 + 4 * i + noise[i], (HEIGHT, WIDTH, 3)).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def check_clips(folder: Path, *firsts: int, blocks: int = BLOCKS) -> None:
    """Check that the clips are pieces of `make_video`'s videos that begin at `firsts`."""
    clips = [file.read(TINY) for file in clip_files(folder, unexpected)]
    levels = sorted(
        [float(frame.mean()) for frame in clip["frames"]] for clip in clips if clip is not None
    )
    assert len(levels) == len(firsts)
    np.testing.assert_allclose(
        levels,
        [[20 + 4 * i for i in range(first, first + 1 + 4 * blocks)] for first in firsts],
        atol=2.5,
    )


def test_videos_become_clips_and_broken_ones_are_named(tmp_path: Path) -> None:
    source, folder, skipped = tmp_path / "videos", tmp_path / "clips", Skipped()
    (source / "deep").mkdir(parents=True)
    make_video(source / "a.mp4", 19)
    make_video(source / "deep" / "c.MP4", 10)
    make_video(source / "short.mkv", 5)
    (source / "b.mp4").write_bytes(b"\x00\x00\x00\x18ftypmp42" + bytes(500))
    (source / "folder.mp4").mkdir()
    (source / "notes.txt").write_text("no video")
    assert import_videos(source, folder, TINY, noting(skipped), BLOCKS) == 3
    assert [name for name, _ in skipped] == ["b.mp4", "folder.mp4"]
    # The second clip opens with the frame that closed the first. The next video does not continue
    # the last one.
    check_clips(folder, 0, 0, 8)
    for file in clip_files(folder, unexpected):
        clip = file.read(TINY)
        assert clip is not None
        assert not clip["poses"].any()
        assert np.array_equal(clip["tokens"], token_ids(Look())[0])
        assert not conditions(TINY, clip["poses"]).any()


def test_another_folder_of_videos_adds_to_the_clips(tmp_path: Path) -> None:
    """Both with a video of the same name; of a video that lies in both, one copy is enough."""
    folder, first, second = (tmp_path / name for name in ("clips", "first", "second"))
    for source, frames in ((first, 9), (second, 17)):
        source.mkdir()
        make_video(source / "a.mp4", frames)
    assert import_videos(first, folder, TINY, unexpected, BLOCKS) == 1
    before = contents(folder)
    (second / "moved.mp4").write_bytes((first / "a.mp4").read_bytes())
    assert import_videos(second, folder, TINY, unexpected, BLOCKS) == 2
    assert contents(folder).items() > before.items()
    check_clips(folder, 0, 0, 8)


def test_an_import_goes_on_where_it_was_broken_off(tmp_path: Path) -> None:
    source, folder = tmp_path / "videos", tmp_path / "clips"
    source.mkdir()
    make_video(source / "a.mp4", 25)
    assert import_videos(source, folder, TINY, unexpected, BLOCKS) == 3
    before = contents(folder)
    missing, cut, kept = sorted(folder.iterdir())
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:-100])
    made = kept.stat().st_mtime_ns
    assert import_videos(source, folder, TINY, unexpected, BLOCKS) == 2
    assert contents(folder) == before
    assert kept.stat().st_mtime_ns == made
    assert import_videos(source, folder, TINY, unexpected, BLOCKS) == 0


@pytest.mark.parametrize("blocks", [1, 4])
def test_videos_cut_to_another_length_replace_their_clips(tmp_path: Path, blocks: int) -> None:
    source, folder = tmp_path / "videos", tmp_path / "clips"
    source.mkdir()
    make_video(source / "a.mp4", 25)
    assert import_videos(source, folder, TINY, unexpected, BLOCKS) == 3
    assert import_videos(source, folder, TINY, unexpected, blocks) == 6 // blocks
    check_clips(folder, *(4 * blocks * piece for piece in range(6 // blocks)), blocks=blocks)


def test_a_clip_that_cannot_be_written_is_no_broken_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = tmp_path / "videos", tmp_path / "clips"
    source.mkdir()
    make_video(source / "a.mp4", 9)
    import_videos(source, folder, TINY, unexpected, BLOCKS)
    (clip,) = folder.iterdir()
    clip.unlink()

    def full(*arguments: object) -> None:
        raise SafetensorError("no space left on device")

    monkeypatch.setattr(clip_data, "save_file", full)
    with pytest.raises(SafetensorError, match="no space"):
        import_videos(source, folder, TINY, unexpected, BLOCKS)
    assert not list(folder.iterdir())  # nothing temporary is left


def test_a_video_that_breaks_off_keeps_its_whole_clips(tmp_path: Path) -> None:
    source, skipped = tmp_path / "videos", Skipped()
    source.mkdir()
    make_video(source / "a.mp4", 40)
    data = bytearray((source / "a.mp4").read_bytes())
    data[len(data) * 3 // 4 : len(data) * 7 // 8] = bytes(
        len(data) * 7 // 8 - len(data) * 3 // 4
    )  # pictures from about the 30th on
    (source / "a.mp4").write_bytes(data)
    make_video(source / "b.mp4", 9)
    written = import_videos(source, tmp_path / "clips", TINY, noting(skipped), BLOCKS)
    assert written >= 3
    assert [name for name, _ in skipped] == ["a.mp4"]
    check_clips(
        tmp_path / "clips", 0, *(8 * piece for piece in range(written - 1))
    )  # all of b, nothing of a in it


# --- the command ---


def test_clips_of_another_length_are_not_made_again_unasked(aapt: Any, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    ask = ("train", "data", folder, "--worlds", 1, "--profile", "tiny-cpu", "--processes", 1)
    assert aapt(*ask, "--blocks", 3).code == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    ran = aapt(*ask, "--blocks", 2)
    assert (
        ran.code == InputError.exit_code
        and "has 13 frames of 64x32, not 9 of 64x32" in ran.err
        and "--force" in ran.err
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert aapt(*ask, "--blocks", 2, "--force").code == 0
    assert {path.name for path in folder.iterdir()} == before.keys() and all(
        path.read_bytes() != before[path.name] for path in folder.iterdir()
    )


def test_videos_that_are_not_there_are_an_error(aapt: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.mp4").write_bytes(b"no video")
    told = {
        "nowhere": "is no file and no folder",
        "empty": "holds no video",
        "broken": "none of 1 videos",
    }
    for name, reason in told.items():
        ran = aapt(
            "train",
            "data",
            tmp_path / "clips",
            "--videos",
            tmp_path / name,
            "--profile",
            "tiny-cpu",
        )
        assert (
            ran.code == InputError.exit_code and reason in ran.err and "Traceback" not in ran.err
        ), ran.err


@pytest.mark.parametrize("command", ["data", "run"])
def test_a_folder_that_cannot_be_written_is_an_error(
    command: str, aapt: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "clips").mkdir()
    render_world(tmp_path / "clips", TINY, 0, 3)
    where = {
        "data": [tmp_path / "file" / "x", "--worlds", 1, "--processes", 1],
        "run": [tmp_path / "clips", "--run", tmp_path / "file" / "x"],
    }
    ran = aapt("train", command, *where[command], "--profile", "tiny-cpu")
    assert (
        ran.code == OutputError.exit_code
        and f"{tmp_path / 'file' / 'x'} cannot be written" in ran.err
    ), ran.err
