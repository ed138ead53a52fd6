"""Clips on disk: rendered flights or a user's own video files, one interface.

A data folder holds `clip-<seed>-<flight>.safetensors` and
`clip-video-<hash of the video>-<piece>.safetensors` files with
    frames  uint8 [1 + 4n, H, W, 3]    frame 0, then n blocks of four frames
    poses   float64 [n + 1, 5]         x, y, z, heading, pitch at frame 0 and at the end of each
                                       block; zeros for real video
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
# Hexadecimal digits of a video's hash in the names of its clips: two of a million videos share them
# once in 560 folders.
NAMED_BY = 12


@dataclass(frozen=True)
class ClipFile:
    """One clip, not yet read."""

    path: Path
    skip: Callable[[Path, str], None]  # called if the clip cannot be used

    def read(self, profile: Profile) -> dict[str, np.ndarray] | None:
        """Return the clip's arrays, or None if it is damaged or of another size."""
        try:
            arrays = load_file(self.path)
            frames, poses, tokens = arrays["frames"], arrays["poses"], arrays["tokens"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            self.skip(self.path, f"unreadable: {error}")
            return None
        v, n = profile.video, len(poses) - 1 if poses.ndim == 2 else 0
        wanted = (1 + v.temporal_stride * n, v.height, v.width, 3)
        if n < 1 or frames.shape != wanted or frames.dtype != np.uint8:
            found = f"frames {frames.shape} {frames.dtype}"
            size = f"{v.width}x{v.height} with poses {poses.shape}"
            self.skip(self.path, f"{found} do not fit {size}")
            return None
        finite = poses.shape[1] == len(dataclasses.fields(Pose)) and np.isfinite(poses).all()
        if not finite or tokens.shape != (PROMPT_TOKENS,):
            self.skip(self.path, f"poses {poses.shape} or tokens {tokens.shape} are not a flight's")
            return None
        return arrays


def clip_files(folder: Path, skip: Callable[[Path, str], None]) -> list[ClipFile]:
    """Return all clips of a folder in a fixed order. Raises InputError if it has none."""
    files = [ClipFile(path, skip) for path in sorted(folder.glob("clip-*.safetensors"))]
    if not files:
        hint = "make one with: aapt train data FOLDER"
        raise InputError(f"data folder {folder} holds no clip", hint)
    return files


def conditions(profile: Profile, poses: np.ndarray) -> np.ndarray:
    """Return camera conditions float32 [n, 6, h, w] of the n blocks between poses [n + 1, 5]."""
    path = [Pose(*row) for row in poses.tolist()]
    return np.concatenate([condition_map(profile, *poses) for poses in pairwise(path)])


def write_clip(path: Path, frames: np.ndarray, poses: np.ndarray, tokens: np.ndarray) -> None:
    """Write one clip, whole or not at all: a killed run leaves no half clip."""
    with whole(path) as temporary:
        save_file({"frames": frames, "poses": poses, "tokens": tokens}, temporary)


def refuse_other_clips(folder: Path, profile: Profile, blocks: int) -> None:
    """Raise InputError if `folder` has whole clips of another length or picture size.

    Rendering or importing would make them again.
    """
    v, length = profile.video, 1 + profile.video.temporal_stride * blocks
    for path in sorted(folder.glob("clip-*.safetensors")):
        shapes = _shapes(path)
        if shapes and shapes["frames"][:3] != [length, v.height, v.width]:
            frames, height, width = shapes["frames"][:3]
            wanted = f"{length} of {v.width}x{v.height}"
            raise InputError(
                f"clip {path} has {frames} frames of {width}x{height}, not {wanted}",
                "name another folder, ask for that length and profile, or add --force to have "
                "clips that do not fit made again",
            )


def _shapes(path: Path) -> dict[str, list[int]]:
    """Return the shapes of a clip's arrays by its header alone.

    Return {} if the file is not a whole clip.
    """
    try:
        with safe_open(path, framework="numpy") as file:  # refuses a file that is cut short
            slices = {name: file.get_slice(name) for name in ("frames", "poses", "tokens")}
            shapes = {name: list(found.get_shape()) for name, found in slices.items()}
            pictures = len(shapes["frames"]) == 4 and slices["frames"].get_dtype() == "U8"
            return shapes if pictures else {}
    except (OSError, SafetensorError):
        return {}


def _is_clip(path: Path, profile: Profile, blocks: int) -> bool:
    """Return whether `path` is a whole clip of `blocks` blocks in the profile's picture size."""
    v = profile.video
    return _shapes(path) == {
        "frames": [1 + v.temporal_stride * blocks, v.height, v.width, 3],
        "poses": [blocks + 1, len(dataclasses.fields(Pose))],
        "tokens": [PROMPT_TOKENS],
    }


def render_world(folder: Path, profile: Profile, seed: int, blocks: int = BLOCKS) -> int:
    """Render the clips of world `seed`, unless the folder has them all at this size.

    Return the number of clips written.
    """
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
    folder: Path, profile: Profile, first_seed: int, worlds: int, processes: int,
    blocks: int = BLOCKS,
) -> Iterator[int]:  # fmt: skip
    """Render `worlds` worlds into `folder`. Yield the clips written after each.

    Resume where an earlier run stopped.
    """
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
    """Cut a video file, or every one under a folder, into clips. Return the clips written.

    Cameras are unknown, so poses are zeros; prompts are open. Clips are named after what is in
    their video. Those of another folder are added, and those that exist stay. Those that an earlier
    import cut to another length or size are deleted. Raises InputError if `source` has no video, or
    none that can be read.
    """
    found = [source] if source.is_file() else source.rglob("*")
    videos = sorted(p for p in found if p == source or p.suffix.lower() in VIDEO_SUFFIXES)
    if not videos:
        what = "holds no video" if source.is_dir() else "is no file and no folder"
        hint = f"name a video, or a folder of videos ({', '.join(VIDEO_SUFFIXES)})"
        raise InputError(f"{source} {what}", hint)
    folder.mkdir(parents=True, exist_ok=True)
    poses, tokens = np.zeros((blocks + 1, len(dataclasses.fields(Pose)))), token_ids(Look())[0]
    length, written = 1 + profile.video.temporal_stride * blocks, 0
    broken: list[Path] = []
    for path in videos:
        try:
            name = _named_after(path)
            for clip in folder.glob(f"{name}-*.safetensors"):
                if not _is_clip(clip, profile, blocks):
                    clip.unlink()
            for piece, frames in enumerate(_cut(path, profile, length)):
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
    """Return how the names of a video's clips begin.

    Raises InputError if the file cannot be read.
    """
    try:
        with video.open("rb") as file:
            return f"clip-video-{hashlib.file_digest(file, 'sha256').hexdigest()[:NAMED_BY]}"
    except OSError as error:
        hint = "name a video file that can be read"
        raise InputError(f"video {video}: {error.strerror or error}", hint) from None


def _cut(video: Path, profile: Profile, length: int) -> Iterator[np.ndarray]:
    """Yield the pieces uint8 [length, H, W, 3] of a video; drop the rest.

    Each piece opens with the frame that closed the one before. Raises InputError as `read_video`
    does, after the pieces before the damage.
    """
    from aapt_deploy.video.pictures import read_video

    held: list[np.ndarray] = []
    size = profile.video
    for frame in read_video(video, size.width, size.height, size.fps):
        held.append(frame)
        if len(held) == length:
            yield np.stack(held)
            held = held[-1:]
