"""The entry point of `aapt` and of `python -m aapt_deploy`: a process whose standard streams may be closed, full or left by their reader.

Importing the command line takes a moment, in which Ctrl-C is already an answer.
"""

import os
import signal
import sys
from typing import TextIO, cast

from aapt_deploy.cli.standard_streams import Data, occupy, settle, stop


def main() -> None:
    """Run the command line."""
    # Where it is ignored, it stays so; torchrun's has to end a process that waits in a collective for another one, which no Python code does.
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and "TORCHELASTIC_RUN_ID" not in os.environ:
        signal.signal(signal.SIGTERM, stop)
    occupy()
    if sys.stdout is not None:
        sys.stdout = cast(TextIO, Data(sys.stdout))
    try:
        from aapt_deploy.cli import commands

        commands.main()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        for stream in (sys.stdout, sys.stderr):
            settle(stream)


if __name__ == "__main__":
    main()
