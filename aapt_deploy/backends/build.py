"""Bundle -> engine: choose the backend's builder and what it is to build. The builders are the backends' own; backends/table.py names them.

Each engine is run and compared before it joins the bundle: with the fp32 engine on a CPU, with the exported graphs on TensorRT.
"""

import importlib

from aapt_deploy.backends.table import BACKENDS, Backend, buildable, refuse_unknown
from aapt_deploy.backends.trial import Built, Options
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.errors import MachineError, UsageError


def build_engine(bundle: Bundle, backend: str, precision: str | None, options: Options) -> list[Built]:
    """Build the engines of `backend`: one precision, or by default all that fit the bundle.

    Raises UsageError for an unknown backend, precision or form of attention, BusyError if another build holds the bundle, BundleError for a
    damaged bundle, MachineError if this machine cannot build it.
    """
    builders = {row.name: row for row in BACKENDS.values() if row.needs_build}
    if backend not in builders:
        raise UsageError(f"backend {backend!r} cannot be built", f"backends: {', '.join(builders)}")
    row = builders[backend]
    _refuse_form(row, options.attention, [other.name for other in builders.values() if other.forms])
    refuse_unknown(backend, precision)
    possible = buildable(bundle, backend)
    wanted = tuple(name for name in row.by_default if name in possible) if precision is None else (precision,)
    if not set(wanted) <= set(possible):
        graphs = bundle.manifest.get("precision", "fp32")
        raise UsageError(
            f"bundle {bundle.path} holds graphs in {graphs}; {backend} builds {' and '.join(possible)} from them, not {precision}",
            f"export another bundle with: aapt export CKPT -o OTHER --precision {'fp8' if precision == 'fp8' else 'fp32'}",
        )
    if row.device == "cpu" and bundle.profile.target.device != "cpu":
        target = bundle.profile.target.name
        raise MachineError(
            f"profile {bundle.profile.name} is for {target}; {backend} runs on the CPU only", "use a CPU profile, or build on its target"
        )
    built: list[Built] = importlib.import_module(row.builder).build(bundle, wanted, options)
    return built


def _refuse_form(row: Backend, attention: str, with_forms: list[str]) -> None:
    """Raise UsageError for a form of attention that `row` does not have."""
    if attention == "auto" or attention in row.forms:
        return
    if row.forms:
        raise UsageError(f"attention {attention!r} does not exist", f"forms: {', '.join(('auto', *row.forms))}")
    raise UsageError(f"--attention is for {', '.join(with_forms)}, not for {row.name}", "leave it out")
