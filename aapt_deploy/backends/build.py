"""Build engines into a bundle: choose the precisions and call the backend's builder.

backends/table.py names the builders. A builder runs and compares each engine before it adds it to
the bundle. The reference is the fp32 engine on a CPU, and the exported graphs on TensorRT.
"""

import importlib

from aapt_deploy.backends.table import (
    BACKENDS,
    Backend,
    buildable,
    refuse_unknown,
    refuse_unsupported,
)
from aapt_deploy.backends.trial import BuildOptions, Built
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.errors import MachineError, UsageError


def build_engine(
    bundle: Bundle, backend: str, precision: str | None, options: BuildOptions
) -> list[Built]:
    """Build the engines of `backend` in one precision; by default in all that fit the bundle.

    Raises UsageError if the backend, the precision or the form of attention does not exist.
    Raises BusyError if another build uses the bundle.
    Raises BundleError if the bundle is damaged.
    Raises MachineError if this machine cannot build the engine.
    """
    builders = {name: row for name, row in BACKENDS.items() if row.needs_build}
    if backend not in builders:
        raise UsageError(f"backend {backend!r} cannot be built", f"backends: {', '.join(builders)}")
    row = builders[backend]
    _refuse_form(row, options.attention)
    if options.sms and not row.names_sms:
        fit = ", ".join(other.name for other in BACKENDS.values() if other.names_sms)
        raise UsageError(f"--sm is for {fit}, not for {row.name}", "leave it out")
    if options.portable and not row.portable:
        fit = ", ".join(other.name for other in BACKENDS.values() if other.portable)
        raise UsageError(f"--portable is for {fit}, not for {row.name}", "leave it out")
    refuse_unknown(backend, precision)
    refuse_unsupported(bundle.profile, backend)
    possible = buildable(bundle, backend)
    default = tuple(name for name in row.by_default if name in possible)
    wanted = default if precision is None else (precision,)
    if not set(wanted) <= set(possible):
        graphs = bundle.manifest.get("precision", "fp32")
        raise UsageError(
            f"bundle {bundle.path} holds graphs in {graphs}; {backend} builds "
            f"{' and '.join(possible)} from them, not {precision}",
            "export another bundle with: aapt export CKPT -o OTHER "
            f"--precision {'fp8' if precision == 'fp8' else 'fp32'}",
        )
    if row.device == "cpu" and bundle.profile.target.device != "cpu":
        name, target = bundle.profile.name, bundle.profile.target.name
        wrong = f"profile {name} is for {target}; {backend} runs on the CPU only"
        raise MachineError(wrong, "use a CPU profile, or build on its target")
    built: list[Built] = importlib.import_module(row.builder).build(bundle, wanted, options)
    return built


def _refuse_form(row: Backend, attention: str) -> None:
    """Raise UsageError if `row` does not have this form of attention."""
    if attention == "auto" or attention in row.forms:
        return
    if row.forms:
        forms = f"forms: {', '.join(('auto', *row.forms))}"
        raise UsageError(f"attention {attention!r} does not exist", forms)
    fit = [other.name for other in BACKENDS.values() if other.forms]
    raise UsageError(f"--attention is for {', '.join(fit)}, not for {row.name}", "leave it out")
