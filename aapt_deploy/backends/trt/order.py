"""Decide what a build is for, and refuse one that cannot succeed before any work.

gpu_here     the GPU of this machine, which TensorRT-RTX can build without
take_order   compute capabilities, forms of attention, scales; checks of memory
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from aapt_deploy.backends.trial import BuildOptions, Progress, Report
from aapt_deploy.backends.trt import cuda
from aapt_deploy.backends.trt.doctor import receipts
from aapt_deploy.backends.trt.doctor.receipts import NATIVE, NATIVE_FP8, OURS, Choice
from aapt_deploy.backends.trt.flavour import LEAN, Flavour
from aapt_deploy.backends.trt.lean import pinned
from aapt_deploy.backends.trt.loading import api_of
from aapt_deploy.backends.trt.remedies import SMALLER
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.bundle.files import free_memory_bytes
from aapt_deploy.bundle.scales import FILE as SCALES
from aapt_deploy.bundle.scales import load as load_scales
from aapt_deploy.errors import MachineError, UsageError
from aapt_deploy.models.cost import Cost, cost_of
from aapt_deploy.ops.block_causal_attention import hopper_fp8, kernels
from aapt_deploy.profiles import Profile

LEAST_HOST_SHARE = 3  # host memory / weights reported by others; below it we only warn


@dataclass(frozen=True)
class Order:
    """What all graphs of one build have in common."""

    bundle: Bundle
    precision: str
    flavour: Flavour
    tensorrt: str  # version
    sms: tuple[int, ...]  # compute capabilities x 10 that the plans are for
    here: cuda.Gpu | None  # the GPU of this machine
    choice: Choice
    scales: list[hopper_fp8.Scales] | None
    cost: Cost
    report: Report
    progress: Progress | None
    portable: bool = False

    @property
    def key(self) -> str:
        return f"{self.flavour.backend}-{self.precision}"

    @property
    def runs_here(self) -> bool:
        """Return whether this machine's GPU can run the plans."""
        return self.here is not None and self.here.sm in self.sms


def take_order(
    bundle: Bundle, precision: str, options: BuildOptions, flavour: Flavour
) -> tuple[Order, list[Choice]]:
    """Return the order and the forms of attention to try, the best first.

    Raises MachineError without TensorRT or room, and without a GPU if the flavour needs one. Raises
    UsageError for compute capabilities that cannot be built for.
    """
    version, report = api_of(flavour).version(), options.report
    device = _device(flavour, report)
    try:
        here = None
        if device is not None:
            here = device.gpu(version, kernels.source_hash() if flavour.plugins else "")
        sms = flavour.targets(options.sms, here.sm if here else None, precision)
        scales = None
        if precision == "fp8":
            scales = load_scales(bundle.checked(SCALES), bundle.profile).attention
        choices = _choices(flavour, here, options, scales is not None)
        cost = cost_of(_with_caches_of(choices[0].form, precision, bundle.profile))
        _check_target(bundle.profile, sms, report)
        if device is not None and device.sm in sms:
            _check_memory(cost, device)
        _check_host(cost, report)
    finally:
        if device is not None:
            device.close()
    progress = options.progress
    order = Order(
        bundle, precision, flavour, version, sms, here, choices[0], scales, cost, report, progress,
        options.portable,
    )  # fmt: skip
    if not order.runs_here:
        names = ", ".join(map(str, sms))
        report(f"{order.key}: for SM {names}, which is not here: plans are built and not run")
    if order.portable:
        report(f"{order.key}: portable; elsewhere it runs with {pinned(LEAN, version)}")
    return order, choices


def _device(flavour: Flavour, report: Report) -> cuda.Device | None:
    """Return this machine's GPU. Raises MachineError without one if the flavour needs it."""
    try:
        return cuda.with_driver()
    except MachineError as error:
        if not flavour.sms:
            raise
        report(f"no GPU is used: {error}")
        return None


def _check_target(profile: Profile, sms: Sequence[int], report: Report) -> None:
    target, name = profile.target, profile.name
    if target.sm and target.sm not in sms:
        made_for = f"was made for {target.name} (SM {target.sm})"
        report(f"profile {name} {made_for}; the plans are for SM {', '.join(map(str, sms))}")


def _with_caches_of(form: str, precision: str, profile: Profile) -> Profile:
    """Return `profile` with the caches of a form of attention; bf16 takes twice the memory."""
    coded = form in (*OURS, NATIVE_FP8)
    cached = "fp8_e4m3" if coded else "fp32" if precision == "fp32" else "bf16"
    return profile.replace(precision=replace(profile.precision, kv_cache=cached))


def _check_memory(needed: Cost, device: cuda.Device) -> None:
    free_gb = device.free_bytes / 1e9
    if needed.total_gb > free_gb:
        parts = ", ".join(f"{name} {gb:.2f}" for name, gb in needed.memory_gb.items())
        free = f"{free_gb:.2f} GB are free on {device.name}"
        text = f"profile {needed.profile} needs {needed.total_gb:.2f} GB ({parts}); {free}"
        raise MachineError(text, SMALLER)


def _check_host(needed: Cost, report: Report) -> None:
    host_gb, wanted_gb = free_memory_bytes() / 1e9, LEAST_HOST_SHARE * needed.memory_gb["weights"]
    if host_gb < wanted_gb:
        taken = f"TensorRT may take {wanted_gb:.1f} GB while it builds"
        report(f"warning: {host_gb:.1f} GB of host memory are free; {taken}")


def _without_plugins(attention: str, fp8: bool) -> Choice:
    """Return the form of attention for a flavour that no proof can be made for yet."""
    if attention != NATIVE_FP8:
        why = "native-fp8 is not proved on a GPU yet" if attention == "auto" else "asked for"
        return Choice(NATIVE, False, True, why)
    if not fp8:
        text = f"attention in form {attention!r} needs the scales of an fp8 bundle"
        raise UsageError(text, "export another bundle with --precision fp8")
    return Choice(NATIVE_FP8, False, True, "asked for; not proved on a GPU yet")


def _choices(
    flavour: Flavour, here: cuda.Gpu | None, options: BuildOptions, fp8: bool
) -> list[Choice]:
    """Return the forms to try, in order. Raises MachineError if the wanted one is not proved."""
    attention = options.attention
    if not flavour.plugins:
        return [_without_plugins(attention, fp8)]
    assert here is not None, f"{flavour.title} builds on a GPU"
    choices = receipts.choose(receipts.load(here), fp8, options.portable)
    if attention == "auto":
        return choices
    wanted = [choice for choice in choices if choice.form == attention]
    if not wanted:
        hint = "aapt doctor --tensorrt, and read what it finds"
        reason = choices[-1].reason
        raise MachineError(f"attention in form {attention!r} is not proved here: {reason}", hint)
    return wanted
