"""Opening engines in tests, as the package does it.

A warning is a failure unless a test listens for it.
"""

from collections.abc import Callable

from aapt_deploy.backends import table
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.rollout.engine import Engines


def unexpected(text: str) -> None:
    raise AssertionError(f"an unexpected warning: {text}")


def silent(text: str) -> None:
    """Take a report that no test reads; words it has to be."""
    assert isinstance(text, str) and text.strip(), repr(text)


def open_engines(
    bundle: Bundle,
    backend: str,
    precision: str | None = None,
    warn: Callable[[str], None] = unexpected,
) -> Engines:
    return table.open_engines(bundle, backend, precision, warn)
