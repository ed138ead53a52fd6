"""Every error a user can meet, each with its exit code and the fix.

    AaptError                 exit  meaning
    ├── UsageError              2   an option, a prompt word or a control is wrong
    ├── VerdictError            3   the job ran; what it measured misses the budget or a threshold
    ├── InputError              4   a file that was given is broken or does not fit
    │   ├── ProfileError            a profile has unknown, missing or contradictory keys
    │   ├── CheckpointError         a checkpoint is damaged or its tensors do not fit its profile
    │   └── BundleError             a bundle is incomplete, was changed, or has another format
    ├── MachineError            5   a package, a driver or the hardware is missing here
    ├── OutputError             6   the output cannot be written
    ├── BusyError               7   another process is working on the same bundle
    ├── ParityError             8   an exported graph or an engine disagrees with its reference
    └── TrainingError           9   training diverged

The command line prints an `AaptError` as one `error:` line and one `hint:` line, in one place.
Any other exception is a bug and keeps its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class AaptError(Exception):
    """Base of all errors that a user can cause and repair. `hint` is the fix, in one sentence."""

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
    """Turn a missing package into a MachineError whose hint installs the package's extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("aapt_deploy"):
            raise
        missing = f"package {error.name!r} is not installed"
        raise MachineError(missing, f"pip install 'aapt_deploy[{extra}]'") from None
