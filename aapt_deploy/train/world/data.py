"""Clips on disk: rendered flights or a user's own video files, one interface.

A data folder holds `clip-<seed>-<flight>.safetensors` and `clip-video-<hash of the video>-<piece>.safetensors` files with
    frames  uint8 [1 + 4n, H, W, 3]    frame 0, then n blocks of four frames
    poses   float64 [n + 1, 5]         x, y, z, heading, pitch at frame 0 and at the end of each block; zeros for real video
    tokens  int64 [4]                  prompt ids
A damaged or mis-sized clip is skipped, counted and named; training never stops for it.
"""

import dataclasses
import hashlib
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from aapt_deploy.bundle.files import whole
from aapt_deploy.errors import InputError
from aapt_deploy.models.aapt.camera import Pose, condition_map
from aapt_deploy.models.aapt.prompts import PROMPT_TOKENS, Look, token_ids
from aapt_deploy.profiles import Profile
from aapt_deploy.train.world.worlds import Clip, World, fly

BLOCKS = 24  # blocks per rendered clip: 97 frames, 4 s
FLIGHTS = 2  # clips per world: a world takes as long to make as 40 frames
VALIDATION_SEED = 10_000_000  # worlds from this seed on are never trained on
VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi")
NAMED_BY = 12  # hexadecimal digits of a video's hash in the names of its clips: two of a million videos share them once in 560 folders


@dataclass(frozen=True)
class ClipFile:
    """One clip, not yet read."""

    path: Path
    skip: Callable[[Path, str], None]  # told when the clip cannot be used

    def read(self, profile: Profile) -> dict[str, np.ndarray] | None:
        """The clip's arrays, or None when it is damaged or of another size."""
        try:
            arrays = load_file(self.path)
            frames, poses, tokens = arrays["frames"], arrays["poses"], arrays["tokens"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            self.skip(self.path, f"unreadable: {error}")
            return None
        v, n = profile.video, len(poses) - 1 if poses.ndim == 2 else 0
        if (
            n < 1
            or frames.shape != (1 + v.temporal_stride * n, v.height, v.width, 3)
            or frames.dtype != np.uint8
        ):
            self.skip(
                self.path,
                f"frames {frames.shape} {frames.dtype} do not fit {v.width}x{v.height} with poses {poses.shape}",
            )
            return None
        if (
            poses.shape[1] != len(dataclasses.fields(Pose))
            or not np.isfinite(poses).all()
            or tokens.shape != (PROMPT_TOKENS,)
        ):
            self.skip(self.path, f"poses {poses.shape} or tokens {tokens.shape} are not a flight's")
            return None
        return arrays


def clip_files(folder: Path, skip: Callable[[Path, str], None]) -> list[ClipFile]:
    """All clips of a folder in a fixed order. Raises InputError when there is none."""
    files = [ClipFile(path, skip) for path in sorted(folder.glob("clip-*.safetensors"))]
    if not files:
        raise InputError(
            f"data folder {folder} holds no clip", "make one with: aapt train data FOLDER"
        )
    return files


def conditions(profile: Profile, poses: np.ndarray) -> np.ndarray:
    """Camera conditions float32 [n, 6, h, w] of the n blocks between `poses` [n + 1, 5]."""
    path = [Pose(*row) for row in poses.tolist()]
    return np.concatenate(
        [condition_map(profile, before, after) for before, after in pairwise(path)]
    )


def write_clip(path: Path, frames: np.ndarray, poses: np.ndarray, tokens: np.ndarray) -> None:
    """Write one clip, whole or not at all: a killed run leaves no half clip."""
    with whole(path) as temporary:
        save_file({"frames": frames, "poses": poses, "tokens": tokens}, temporary)


def refuse_other_clips(folder: Path, profile: Profile, blocks: int) -> None:
    """Raise InputError if `folder` holds whole clips of another length or picture size, which rendering or importing would make again."""
    v, length = profile.video, 1 + profile.video.temporal_stride * blocks
    for path in sorted(folder.glob("clip-*.safetensors")):
        shapes = _shapes(path)
        if shapes and shapes["frames"][:3] != [length, v.height, v.width]:
            frames, height, width = shapes["frames"][:3]
            raise InputError(
                f"clip {path} has {frames} frames of {width}x{height}, not {length} of {v.width}x{v.height}",
                "name another folder, ask for that length and profile, or add --force to have clips that do not fit made again",
            )


def _shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of a clip's arrays by its header alone; none of a file that is no whole clip."""
    try:
        with safe_open(
            path, framework="numpy"
        ) as file:  # refuses a file that is shorter than its header says
            shapes = {
                name: list(file.get_slice(name).get_shape())
                for name in ("frames", "poses", "tokens")
            }
            return (
                shapes
                if len(shapes["frames"]) == 4 and file.get_slice("frames").get_dtype() == "U8"
                else {}
            )
    except (OSError, SafetensorError):
        return {}


def _is_clip(path: Path, profile: Profile, blocks: int) -> bool:
    """Whether `path` holds a whole clip of `blocks` blocks in the profile's picture size."""
    v = profile.video
    return _shapes(path) == {
        "frames": [1 + v.temporal_stride * blocks, v.height, v.width, 3],
        "poses": [blocks + 1, len(dataclasses.fields(Pose))],
        "tokens": [PROMPT_TOKENS],
    }


def render_world(folder: Path, profile: Profile, seed: int, blocks: int = BLOCKS) -> int:
    """Render the clips of world `seed`, unless the folder has them all, of this length and size. Returns how many it wrote."""
    paths = [folder / f"clip-{seed:08d}-{flight}.safetensors" for flight in range(FLIGHTS)]
    if all(_is_clip(path, profile, blocks) for path in paths):
        return 0
    world = World(seed, Look(), profile.video.width, profile.video.height)
    rng = np.random.default_rng((seed, 1))
    for path in paths:
        clip: Clip = fly(world, rng, blocks, profile.video.fps, profile.video.temporal_stride)
        poses = np.array([list(vars(pose).values()) for pose in clip.poses])
        write_clip(path, clip.frames, poses, token_ids(clip.look)[0])
    return len(paths)


def _render_task(task: tuple[Path, Profile, int, int]) -> int:
    return render_world(*task)


def render_worlds(
    folder: Path,
    profile: Profile,
    first_seed: int,
    worlds: int,
    processes: int,
    blocks: int = BLOCKS,
) -> Iterator[int]:
    """Render `worlds` worlds into `folder`, yielding the clips written after each. Resumes where an earlier run stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [(folder, profile, seed, blocks) for seed in range(first_seed, first_seed + worlds)]
    if processes == 1:
        yield from map(_render_task, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(_render_task, tasks)


def import_videos(
    source: Path,
    folder: Path,
    profile: Profile,
    skip: Callable[[Path, str], None],
    blocks: int = BLOCKS,
) -> int:
    """Cut a video file, or every one under a folder, into clips. Cameras are unknown, so poses are zeros; prompts are open. Returns clips written.

    Clips are named after what is in their video: another folder's join them, those that are there already stay, and those that an earlier import
    cut to another length or size go. Raises InputError when `source` has no video, or none that can be read.
    """
    videos = (
        [source]
        if source.is_file()
        else sorted(p for p in source.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
    )
    if not videos:
        what = "holds no video" if source.is_dir() else "is no file and no folder"
        raise InputError(
            f"{source} {what}", f"name a video, or a folder of videos ({', '.join(VIDEO_SUFFIXES)})"
        )
    folder.mkdir(parents=True, exist_ok=True)
    poses, tokens, written = (
        np.zeros((blocks + 1, len(dataclasses.fields(Pose)))),
        token_ids(Look())[0],
        0,
    )
    broken: list[Path] = []
    for path in videos:
        try:
            name = _named_after(path)
            for clip in folder.glob(f"{name}-*.safetensors"):
                if not _is_clip(clip, profile, blocks):
                    clip.unlink()
            for piece, frames in enumerate(
                _cut(path, profile, 1 + profile.video.temporal_stride * blocks)
            ):
                clip = folder / f"{name}-{piece:06d}.safetensors"
                if not clip.exists():
                    write_clip(clip, frames, poses, tokens)
                    written += 1
        except InputError as error:
            broken.append(path)
            skip(path, str(error))
    if broken == videos:
        raise InputError(
            f"none of {len(videos)} videos in {source} can be read whole",
            "name videos that ffmpeg can decode",
        )
    return written


def _named_after(video: Path) -> str:
    """How the names of a video's clips begin. Raises InputError for a file that cannot be read."""
    try:
        with video.open("rb") as file:
            return f"clip-video-{hashlib.file_digest(file, 'sha256').hexdigest()[:NAMED_BY]}"
    except OSError as error:
        raise InputError(
            f"video {video}: {error.strerror or error}", "name a video file that can be read"
        ) from None


def _cut(video: Path, profile: Profile, length: int) -> Iterator[np.ndarray]:
    """The pieces uint8 [length, H, W, 3] of a video, each of which opens with the frame that closed the one before; the rest is left out.

    Raises InputError as `read_video` does, after the pieces before the damage.
    """
    from aapt_deploy.video.pictures import read_video

    held: list[np.ndarray] = []
    for frame in read_video(video, profile.video.width, profile.video.height, profile.video.fps):
        held.append(frame)
        if len(held) == length:
            yield np.stack(held)
            held = held[-1:]
