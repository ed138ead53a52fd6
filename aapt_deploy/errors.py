"""Every error a user can meet, each with its exit code and the fix.

    AaptError                 exit  meaning
    ├── UsageError              2   an option, a prompt word or a control is wrong
    ├── VerdictError            3   the job ran; what it measured misses the budget or a threshold
    ├── InputError              4   a file that was given is broken or does not fit
    │   ├── ProfileError            a profile has unknown, missing or contradictory keys
    │   ├── CheckpointError         a checkpoint is damaged or has other tensors than the profile asks for
    │   └── BundleError             a bundle is incomplete, was changed, or is of another format
    ├── MachineError            5   a package, a driver or the hardware is missing here
    ├── OutputError             6   the output cannot be written
    ├── BusyError               7   another process is working on the same bundle
    ├── ParityError             8   an exported graph or an engine disagrees with its reference
    └── TrainingError           9   training diverged

An `AaptError` reaches the user as one `error:` line and one `hint:` line; the command line does that in one place. Everything else that
escapes is a bug and keeps its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class AaptError(Exception):
    """Base of all errors that a user can cause and repair.

    `hint` says how to repair it, in one sentence.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(AaptError):
    exit_code = 2


class VerdictError(AaptError):
    exit_code = 3


class InputError(AaptError):
    exit_code = 4


class ProfileError(InputError):
    pass


class CheckpointError(InputError):
    pass


class BundleError(InputError):
    pass


class MachineError(AaptError):
    exit_code = 5


class OutputError(AaptError):
    exit_code = 6


class BusyError(AaptError):
    exit_code = 7


class ParityError(AaptError):
    exit_code = 8


class TrainingError(AaptError):
    exit_code = 9


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turn a missing package into a MachineError with the command that installs the extra it belongs to."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("aapt_deploy"):
            raise
        raise MachineError(f"package {error.name!r} is not installed", f"pip install 'aapt_deploy[{extra}]'") from None
