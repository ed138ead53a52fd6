"""Say which TensorRT: TensorRT proper, or TensorRT-RTX for GeForce and RTX GPUs.

TensorRT-RTX has the same API and parser. It compiles plans for named compute capabilities without a
GPU, and finishes them on the user's GPU. It has neither plugins nor timing caches, and no SM 90.

    PROPER  10.16 to 11.x   plans for the GPU that is here; our plugin or TensorRT's own attention
    LEAN    10.16 to 11.x   TensorRT's runtime alone, 44 MB; runs PROPER's portable plans
    RTX     1.7 and later   plans for one or more named GPUs; TensorRT's own attention

A process uses one of them, whichever `Flavour.api` is asked for first.
"""

import importlib
import importlib.metadata
import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from aapt_deploy.backends.trt.doctor.receipts import AOT, NATIVE, NATIVE_FP8, PYTHON
from aapt_deploy.errors import MachineError, UsageError

API = "aapt_deploy.backends.trt.api"
FP8_SM, BF16_SM = 89, 80  # the oldest with products in these formats


@dataclass(frozen=True)
class Flavour:
    """One TensorRT."""

    backend: str  # its row in backends/table.py
    title: str
    module: str  # of its Python bindings
    packages: tuple[str, ...]  # that a release is pinned by
    oldest: tuple[int, int]
    too_new: tuple[int]
    forms: tuple[str, ...]  # of attention, the best first
    sms: tuple[int, ...] = ()  # that a plan can be built for by name; (): only for the GPU here
    default_sms: tuple[int, ...] = ()  # without a GPU
    timing_cache: bool = False
    plugins: bool = False
    compiles_here: bool = False  # a plan is finished on the user's GPU, just in time
    lean: bool = False  # runs portable plans of `backend`; neither builds nor describes any

    @property
    def install(self) -> str:
        return f"pip install 'aapt_deploy[{self.backend}{'-lean' if self.lean else ''}]'"

    def pinned(self, release: str) -> str:
        """Return the command that installs one release."""
        return " ".join((self.install, *(f"{name}=={release}" for name in self.packages)))

    @property
    def installed(self) -> str | None:
        """Return the release that is installed, without loading it; None if there is none."""
        names = importlib.metadata.packages_distributions().get(self.module, [])
        return importlib.metadata.version(names[0]) if names else None

    def api(self) -> Any:
        """Return the module api.py over this flavour's bindings.

        Raises MachineError if they are not installed, or another flavour is in use here.
        """
        global _wanted
        if API not in sys.modules:
            _wanted = self
        module = importlib.import_module(API)
        if module.FLAVOUR is not self:
            text = f"this process uses {module.FLAVOUR.title} already"
            raise MachineError(text, f"run {self.title} in a process of its own")
        return module

    def targets(self, wanted: tuple[int, ...], here: int | None, precision: str) -> tuple[int, ...]:
        """Return the compute capabilities to build for, each x 10.

        `wanted` are the user's; `here` is the GPU's, if there is one. Raises UsageError for one
        that cannot be built for by name. Raises MachineError if one is too old for `precision`.
        """
        if not self.sms:
            assert here is not None, f"{self.title} builds on a GPU"
            if wanted:
                text = f"--sm {','.join(map(str, wanted))}: {self.title} builds for the GPU here"
                raise UsageError(text, "leave --sm out, or take --backend tensorrt-rtx")
            chosen: tuple[int, ...] = (here,)
        elif wanted:
            chosen = wanted
        elif here is not None:
            chosen = (here,)
        else:
            chosen = tuple(sm for sm in self.default_sms if precision != "fp8" or sm >= FP8_SM)
        known = ", ".join(map(str, self.sms))
        for sm in chosen:
            if sm < BF16_SM and (self.sms or precision != "fp32"):
                text = f"SM {sm} has no fast products in float32 or bf16"
                raise MachineError(f"{text}; {self.title} needs SM {BF16_SM}", f"one of: {known}")
            if self.sms and sm not in self.sms:
                text = f"{self.title} cannot build for SM {sm}"
                raise UsageError(text, f"one of: {known}")
            if precision == "fp8" and sm < FP8_SM:
                raise MachineError(
                    f"SM {sm} has no products in FP8, which need SM {FP8_SM}",
                    "export with --precision fp32 and build with --precision bf16",
                )
        return tuple(sorted(set(chosen)))


PROPER = Flavour(
    "tensorrt", "TensorRT", "tensorrt", ("tensorrt",), (10, 16), (12,),
    (PYTHON, AOT, NATIVE_FP8, NATIVE), timing_cache=True, plugins=True,
)  # fmt: skip
LEAN = replace(
    PROPER, title="TensorRT's lean runtime", module="tensorrt_lean_bindings",
    packages=("tensorrt-lean-cu13-libs", "tensorrt-lean-cu13-bindings"), timing_cache=False,
    lean=True,
)  # fmt: skip
RTX = Flavour(
    "tensorrt-rtx", "TensorRT-RTX", "tensorrt_rtx_bindings",
    ("tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu13-bindings"), (1, 7), (2,), (NATIVE_FP8, NATIVE),
    sms=(80, 86, 89, 120, 121), default_sms=(86, 89, 120), compiles_here=True,
)  # fmt: skip
FLAVOURS = {flavour.backend: flavour for flavour in (PROPER, RTX)}

_wanted = PROPER


def for_portable(release: str) -> Flavour:
    """Return what runs the portable plans of a TensorRT release here.

    TensorRT goes before its lean runtime, and the plans' own release before another. Another one
    cannot run them: a newer TensorRT would need code inside the plan, which is never run. Whoever
    opens the plans checks the release. Raises MachineError if neither is installed.
    """
    here = {flavour: flavour.installed for flavour in (PROPER, LEAN)}
    found = [flavour for flavour, installed in here.items() if installed]
    if not found:
        text = f"the plans need TensorRT {release} or its lean runtime; neither is installed"
        raise MachineError(text, f"{LEAN.pinned(release)}; or {PROPER.pinned(release)}")
    return next((flavour for flavour in found if here[flavour] == release), found[0])


def bindings() -> tuple[Flavour, ModuleType]:
    """Return the flavour of this process and its bindings, for api.py and the plugins.

    Raises MachineError if they cannot be loaded.
    """
    try:
        return _wanted, importlib.import_module(_wanted.module)
    except (ImportError, OSError) as error:  # OSError: a library is missing
        text = f"{_wanted.title} cannot be loaded: {error}"
        raise MachineError(text, _wanted.install) from None
