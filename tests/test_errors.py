"""Exit codes are those of the tree in errors.py, and a missing package becomes an error."""

import re

import pytest

from aapt_deploy import errors
from aapt_deploy.errors import AaptError, MachineError, needs_extra

CODES = {
    "AaptError": 1, "UsageError": 2, "VerdictError": 3, "InputError": 4, "ProfileError": 4,
    "CheckpointError": 4, "BundleError": 4, "MachineError": 5, "OutputError": 6, "BusyError": 7,
    "ParityError": 8, "TrainingError": 9,
}  # fmt: skip


def test_every_error_has_its_exit_code() -> None:
    """Scripts count on them. Those of one family share a code."""
    found = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    kinds = {name: kind for name, kind in found.items() if issubclass(kind, AaptError)}
    assert {name: kind.exit_code for name, kind in kinds.items()} == CODES
    told = re.findall(r"── (\w+) +(\d+)", errors.__doc__ or "")
    assert {name: int(code) for name, code in told}.items() <= CODES.items()
    assert len(told) == len(set(CODES.values()) - {1})


def test_an_error_has_its_message_and_the_fix() -> None:
    error = MachineError("no GPU", "install one")
    assert (str(error), error.hint, AaptError("x").hint) == ("no GPU", "install one", "")


@pytest.mark.parametrize("name", ["onnx", "onnx.helper"])
def test_a_missing_package_becomes_an_error_with_its_install_command(name: str) -> None:
    with pytest.raises(MachineError) as caught, needs_extra("export"):
        raise ModuleNotFoundError("No module", name=name)
    assert str(caught.value) == f"package {name!r} is not installed"
    assert caught.value.hint == "pip install 'aapt_deploy[export]'"
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize(
    "error",
    [ModuleNotFoundError("x", name="aapt_deploy.models.nothing"), ImportError("x"), KeyError("x")],
    ids=repr,
)
def test_a_bug_stays_a_bug(error: Exception) -> None:
    """A module of our own that is missing, or any other error."""
    with pytest.raises(type(error)), needs_extra("export"):
        raise error
