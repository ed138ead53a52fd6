"""Entry point of `aapt` and `python -m aapt_deploy`. Survives closed, full and broken streams.

Importing the command line takes a moment; Ctrl-C already ends the process cleanly then.
"""

import os
import signal
import sys
from types import FrameType
from typing import TextIO, cast

from aapt_deploy.cli.standard_streams import Guarded, occupy, settle


def main() -> None:
    """Run the command line."""
    # An ignored SIGTERM stays ignored. Under torchrun it must end a process that waits in a
    # collective for another one, which no Python code does.
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and not by_torchrun:
        signal.signal(signal.SIGTERM, stop)
    occupy()
    if sys.stdout is not None:
        sys.stdout = cast(TextIO, Guarded(sys.stdout, is_data=True))
    try:
        from aapt_deploy.cli import commands

        commands.main()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        for stream in (sys.stdout, sys.stderr):
            settle(stream)


def stop(number: int, frame: FrameType | None) -> None:
    """End as Ctrl-C does: unfinished files are removed. A stream has handlers of its own.

    A second signal must not disturb that: `timeout` sends two.
    """
    signal.signal(number, lambda *_: None)  # not SIG_IGN, which child processes would inherit
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
