"""Portable plans, and what the lean runtime that runs them lacks. api.py makes these calls.

    make_portable     restrict a build to what the lean runtime can run
    require_started   refuse a lean runtime that was made without a driver

`trt` is the bindings module.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aapt_deploy.backends.trt.remedies import refusal
from aapt_deploy.errors import BundleError, MachineError


def make_portable(trt: Any, parser: Any, config: Any, graph: Path) -> None:
    """Let the lean runtime of this release run the plan of a parsed graph.

    The runtime is left out of the plan, because code inside a plan is never run. Raises BundleError
    if the graph needs a library of TensorRT's plugins.
    """
    if libraries := parser.get_used_vc_plugin_libraries():
        text = f"graph {graph} needs TensorRT's plugins in {', '.join(libraries)}"
        raise BundleError(f"{text}; a portable plan does not have them", "leave out --portable")
    config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)


def require_started(runtime: Any, what: str, said: Sequence[str]) -> None:
    """Raise MachineError if `said`, the log, has a reason why a lean runtime cannot work.

    Without a driver one is made all the same, and ends the process when it is used or freed.
    """
    error = refusal(what, [], said)
    if isinstance(error, MachineError):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(runtime))  # it must never be freed
        raise error
