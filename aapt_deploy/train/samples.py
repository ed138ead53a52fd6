"""Stream a checkpoint to look at: a video and a row of frames from each start frame.

Nothing is measured here; `evaluate` does that.
"""

import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from aapt_deploy.backends.torch_eager import EagerEngines
from aapt_deploy.models import checkpoint
from aapt_deploy.models.aapt.camera import CRUISE, Velocity
from aapt_deploy.models.aapt.prompts import parse, token_ids
from aapt_deploy.rollout.loop import Steering, rollout
from aapt_deploy.train.scalars import Events
from aapt_deploy.video.pictures import write_image
from aapt_deploy.video.sinks import open_sink

COLUMNS = 6
TURN = 0.2  # radians per second, to the left and to the right in turn


def write_samples(path: Path, out: Path, seconds: int) -> Path:
    """Stream `seconds` from every start frame of the checkpoint at `path` into `out`.

    NAME.mp4, their frames in sheet.png, and the sheet for TensorBoard. `out` appears when complete.
    """
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    _write(checkpoint.load(path), unfinished, seconds)
    unfinished.rename(out)
    return out


def _write(loaded: checkpoint.Checkpoint, out: Path, seconds: int) -> None:
    profile, video = loaded.profile, loaded.profile.video
    per_second = video.fps // video.temporal_stride
    blocks, rows = seconds * per_second, []

    for name, frame in loaded.start_frames.items():
        text = token_ids(parse(frame.prompt)) if profile.text.tokens else None

        def steer(block: int, text: np.ndarray | None = text) -> Steering:
            yaw = TURN if block // (2 * per_second) % 2 else -TURN
            return Steering(Velocity(CRUISE.forward, yaw=yaw), text)

        engines, row = EagerEngines(loaded, torch.get_num_threads(), "fp32"), []
        chosen = set(np.linspace(0, blocks, COLUMNS).round().astype(int).tolist())
        shown = islice(rollout(engines, profile, frame.image.numpy(), steer, 0), 1 + blocks)
        path = str(out / f"{name}.mp4")
        with open_sink(path, None, video.width, video.height, video.fps) as sink:
            for block, frames in enumerate(shown):
                sink.write(frames)
                if block in chosen:
                    row.append(frames[-1])
        rows.append(np.concatenate(row, axis=1))
    if rows:
        sheet = np.ascontiguousarray(np.concatenate(rows))
        write_image(out / "sheet.png", sheet)
        png = (out / "sheet.png").read_bytes()
        Events(out, 0).picture(0, f"seconds 0 to {seconds}", png, *sheet.shape[:2])
