"""Load api.py over the bindings of one flavour of TensorRT."""

import importlib
import sys
from typing import Any

from aapt_deploy.backends.trt.flavour import Flavour, want
from aapt_deploy.errors import MachineError

API = "aapt_deploy.backends.trt.api"


def api_of(flavour: Flavour) -> Any:
    """Return the module api.py over the bindings of `flavour`.

    Raises MachineError if they are not installed, or another flavour is in use in this process.
    """
    if API not in sys.modules:
        want(flavour)
    module = importlib.import_module(API)
    if module.FLAVOUR is not flavour:
        text = f"this process uses {module.FLAVOUR.title} already"
        raise MachineError(text, f"run {flavour.title} in a process of its own")
    return module
