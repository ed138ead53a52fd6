"""Choose what runs portable plans: TensorRT, or its lean runtime where TensorRT is not installed.

Both must be of the release that built the plans. A newer one would run code inside the plan, which
never happens here (api_lean.py).
"""

import importlib.metadata

from aapt_deploy.backends.trt.flavour import LEAN, PROPER, Flavour
from aapt_deploy.errors import MachineError

PACKAGES = {  # that a release is pinned by
    PROPER: ("tensorrt",),
    LEAN: ("tensorrt-lean-cu13-libs", "tensorrt-lean-cu13-bindings"),
}


def pinned(flavour: Flavour, release: str) -> str:
    """Return the command that installs a release."""
    packages = (f"{name}=={release}" for name in PACKAGES[flavour])
    return " ".join((f"pip install 'aapt_deploy[{flavour.backend}]'", *packages))


def installed(flavour: Flavour) -> str | None:
    """Return the release that is installed, without loading it; None if there is none."""
    names = importlib.metadata.packages_distributions().get(flavour.module, [])
    return importlib.metadata.version(names[0]) if names else None


def runs_portable(release: str) -> Flavour:
    """Return what runs the portable plans of a TensorRT release here; TensorRT goes first.

    Raises MachineError if neither TensorRT nor its lean runtime is here in this release.
    """
    here = {flavour: installed(flavour) for flavour in (PROPER, LEAN)}
    for flavour, found in here.items():
        if found == release:
            return flavour
    others = [f"{flavour.title} {found}" for flavour, found in here.items() if found]
    text = f"the plans are portable and were built with TensorRT {release}; they run with it or"
    text += f" its lean runtime, and here is {' and '.join(others) or 'neither'}"
    raise MachineError(text, f"{pinned(LEAN, release)}; or {pinned(PROPER, release)}")
