"""One person's stream: a rollout, paced and steered by the newest controls.

Also the one place that decides what a signal does to a stream: `stop_signals`. Deliberately not
here: sinks and sockets. Whoever iterates over the frames sends them.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import numpy as np

from aapt_deploy.errors import UsageError
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.engine import Engines
from aapt_deploy.rollout.loop import Steering, rollout
from aapt_deploy.rollout.starts import Start, text_of
from aapt_deploy.stream.controls import Controls

GRACE_S = 3.0  # for the current block, after a signal


@dataclass
class Session:
    """A stream of one person. `warn` gets one line for a prompt that cannot be read."""

    profile: Profile
    begin: Start
    controls: Controls
    warn: Callable[[str], None]
    seed: int = 0
    wanted: int | None = None  # frames; None: endless
    realtime: bool = False  # yield each block when it is due, not as soon as it is made
    first_block_at: float = 0.0  # when the first block was made, on time.perf_counter's clock

    def __post_init__(self) -> None:
        self._prompt, self._text = self.begin.prompt, self.begin.text

    def frames(self, engines: Engines) -> Iterator[np.ndarray]:
        """Yield uint8 frames [T, H, W, 3]: the start image (T = 1), then block by block."""
        fps, made, started = self.profile.video.fps, 0, time.perf_counter()
        for frames in rollout(engines, self.profile, self.begin.image, self.steer, self.seed):
            if made and not self.first_block_at:
                self.first_block_at = time.perf_counter()
            if self.realtime and made:
                time.sleep(max(0.0, started + made / fps - time.perf_counter()))
            shown = frames if self.wanted is None else frames[: self.wanted - made]
            yield shown
            self._warn_beyond_training(made, made + len(shown))
            made += len(shown)
            if made == self.wanted:
                return

    def _warn_beyond_training(self, before: int, after: int) -> None:
        """Warn once, at the first frame that no training video of the generator had."""
        limit = self.profile.trained_seconds * self.profile.video.fps
        if before <= limit < after:
            seconds = self.profile.trained_seconds
            self.warn(f"the generator was trained on {seconds:.1f} s; pictures may drift from here")

    def steer(self, block: int) -> Steering:
        """Return the newest velocity and text. A prompt that cannot be read is only a warning."""
        control = self.controls.at(block, block * self.profile.block_seconds)
        wanted = control.prompt
        if self.begin.text is not None and wanted is not None and wanted != self._prompt:
            self._prompt = wanted
            try:
                self._text = text_of(self.profile, wanted)
            except UsageError as error:
                self.warn(f"{error}; the last prompt stays")
        return Steering(control.velocity, self._text)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of ending the process.

    The first one leaves GRACE_S for the current block. After that, or on a second one,
    KeyboardInterrupt is raised: a pipe that nobody opens or reads would block its writer forever.
    """
    caught: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        signal.setitimer(signal.ITIMER_REAL, GRACE_S)

    def overdue(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    handlers = {signal.SIGINT: handle, signal.SIGTERM: handle, signal.SIGALRM: overdue}
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield caught
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in old.items():
            signal.signal(number, handler)
