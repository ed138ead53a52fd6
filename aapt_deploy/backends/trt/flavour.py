"""Say which TensorRT: TensorRT proper, or TensorRT-RTX for GeForce and RTX GPUs.

TensorRT-RTX has the same API and parser. It compiles plans for named compute capabilities without a
GPU, and finishes them on the user's GPU. It has neither plugins nor timing caches, and no SM 90.

    PROPER  10.16 to 11.x   plans for the GPU that is here; our plugin or TensorRT's own attention
    RTX     1.7 and later   plans for one or more named GPUs; TensorRT's own attention
    LEAN    10.16 to 11.x   TensorRT's runtime alone, 44 MB; runs portable plans of PROPER (lean.py)

A process uses one of them, whichever loading.py is asked for first.
"""

import importlib
from dataclasses import dataclass, replace
from types import ModuleType

from aapt_deploy.backends.trt.doctor.receipts import AOT, NATIVE, NATIVE_FP8, PYTHON
from aapt_deploy.errors import MachineError, UsageError

FP8_SM, BF16_SM = 89, 80  # the oldest with products in these formats


@dataclass(frozen=True)
class Flavour:
    """One TensorRT."""

    backend: str  # its row in backends/table.py and its extra; LEAN has no row
    title: str
    module: str  # of its Python bindings
    oldest: tuple[int, int]
    too_new: tuple[int]
    forms: tuple[str, ...]  # of attention, the best first
    sms: tuple[int, ...] = ()  # that a plan can be built for by name; (): only for the GPU here
    default_sms: tuple[int, ...] = ()  # without a GPU
    timing_cache: bool = False
    lean: bool = False  # neither builds plans nor describes their layers
    plugins: bool = False
    compiles_here: bool = False  # a plan is finished on the user's GPU, just in time

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
    "tensorrt", "TensorRT", "tensorrt", (10, 16), (12,), (PYTHON, AOT, NATIVE_FP8, NATIVE),
    timing_cache=True, plugins=True,
)  # fmt: skip
RTX = Flavour(
    "tensorrt-rtx", "TensorRT-RTX", "tensorrt_rtx_bindings", (1, 7), (2,), (NATIVE_FP8, NATIVE),
    sms=(80, 86, 89, 120, 121), default_sms=(86, 89, 120), compiles_here=True,
)  # fmt: skip
LEAN = replace(
    PROPER, backend="tensorrt-lean", title="TensorRT's lean runtime",
    module="tensorrt_lean_bindings", timing_cache=False, lean=True,
)  # fmt: skip
FLAVOURS = {flavour.backend: flavour for flavour in (PROPER, RTX)}

_wanted = PROPER


def want(flavour: Flavour) -> None:
    """Let the next import of api.py be over `flavour`."""
    global _wanted
    _wanted = flavour


def bindings() -> tuple[Flavour, ModuleType]:
    """Return the flavour of this process and its bindings, for api.py and plugins.

    Raises MachineError if they cannot be loaded.
    """
    try:
        return _wanted, importlib.import_module(_wanted.module)
    except (ImportError, OSError) as error:  # OSError: a library is missing
        text = f"{_wanted.title} cannot be loaded: {error}"
        raise MachineError(text, f"pip install 'aapt_deploy[{_wanted.backend}]'") from None
