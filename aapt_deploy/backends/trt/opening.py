"""Open a bundle's TensorRT engines, once their plans have been checked.

A plan's receipt (TensorRT, GPU, kernels, graph) and its hash are checked before it is deserialised.
"""

from dataclasses import dataclass

from aapt_deploy.backends.trt import plan_file
from aapt_deploy.backends.trt.cuda import Device, Gpu, with_driver
from aapt_deploy.backends.trt.doctor import receipts
from aapt_deploy.backends.trt.engine import RunOptions, TrtEngines
from aapt_deploy.backends.trt.flavour import PROPER, Flavour
from aapt_deploy.backends.trt.lean import runs_portable
from aapt_deploy.backends.trt.loading import api_of
from aapt_deploy.backends.trt.plan_file import AGAIN, Receipt
from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.errors import BundleError, MachineError
from aapt_deploy.models.family import family_of
from aapt_deploy.ops.block_causal_attention import hopper_fp8


@dataclass(frozen=True)
class Entry:
    """One TensorRT engine, as the manifest describes it."""

    graphs: dict[str, str]  # graph -> plan file
    receipts: dict[str, Receipt]
    # "python": our plugin in Python; "aot": compiled into the plan; "native": TensorRT's attention
    plugin: str
    scales: str | None  # file with the scales of FP8 caches
    captured: bool
    portable: bool = False  # plans that TensorRT's lean runtime can run

    def runs_on(self, built_with: Flavour) -> Flavour:
        """Return the flavour that runs the plans here.

        Raises MachineError if they are portable and nothing here runs them.
        """
        if not self.portable:
            return built_with
        return runs_portable(next(iter(self.receipts.values())).tensorrt)

    @classmethod
    def of(cls, bundle: Bundle, precision: str, flavour: Flavour) -> "Entry":
        """Read the manifest. Raises BundleError if its entry is not whole."""
        raw = bundle.engines[f"{flavour.backend}-{precision}"]
        files, given = raw.get("graphs"), raw.get("receipts")
        plugin, scales, captured = raw.get("plugin"), raw.get("scales"), raw.get("cuda_graph", True)
        portable = raw.get("portable", False)
        wanted, named = family_of(bundle.profile).signatures(bundle.profile).keys(), False
        if isinstance(files, dict) and isinstance(given, dict):
            named = files.keys() == given.keys() == wanted
        if not (
            named and files and given and all(isinstance(file, str) for file in files.values())
            and plugin in flavour.forms and isinstance(scales, str | None)
            and isinstance(captured, bool) and isinstance(portable, bool)
        ):  # fmt: skip
            entry = f"what its manifest says of its {flavour.backend} engine in {precision}"
            raise BundleError(f"bundle {bundle.path}: {entry} is not whole", AGAIN)
        parsed = {name: Receipt.of(given[name], files[name]) for name in files}
        return cls(files, parsed, str(plugin), scales, captured, portable)


def open_bundle(bundle: Bundle, precision: str, flavour: Flavour = PROPER) -> TrtEngines:
    """Open the engines of `bundle` in `precision`: graphs captured, everything allocated.

    No plan is deserialised before all of them have been checked. Raises MachineError without
    TensorRT, driver or GPU, or with another than the plans' own. Raises BundleError for plans
    that are stale, changed or not whole. Raises InputError for damaged scales.
    """
    entry, backend = Entry.of(bundle, precision, flavour), flavour.backend
    flavour = entry.runs_on(flavour)
    device = with_driver()
    try:
        api = api_of(flavour)
        here = _checked(bundle, entry, device, api.version())
        files = {name: bundle.checked(file) for name, file in entry.graphs.items()}
        caches = _scales(bundle, entry.scales) if entry.scales else []
        if entry.plugin == "python":
            from aapt_deploy.backends.trt.plugin import python as python_plugin
            from aapt_deploy.ops.block_causal_attention import kernels

            python_plugin.register(kernels.launcher)
        plans = {name: api.open_plan(file) for name, file in files.items()}
    except BaseException:
        device.close()
        raise
    listed, compiled = bundle.manifest["files"], {}
    for name, file in entry.graphs.items() if flavour.compiles_here else ():
        compiled[name] = receipts.compiled_file(listed[file]["sha256"], here)
    options = RunOptions(entry.captured, caches, compiled=compiled)
    return TrtEngines(bundle.profile, plans, device, precision, options, backend)


def runs_here(bundle: Bundle, precision: str, flavour: Flavour) -> str:
    """Return what is known of an engine on this machine's GPU, without opening it.

    Raises what `open_bundle` raises before it deserialises, and MachineError for a plan that
    TensorRT-RTX finds invalid here.
    """
    entry = Entry.of(bundle, precision, flavour)
    flavour, device = entry.runs_on(flavour), with_driver()
    try:
        api = api_of(flavour)
        here = _checked(bundle, entry, device, api.version())
        found = f"its receipts fit {here.gpu} (SM {here.sm})"
        for file in entry.graphs.values() if flavour.compiles_here else ():
            answer, wrong = api.validity(bundle.checked(file))
            if answer == "INVALID":
                reason = ", ".join(wrong) or "it gives no reason"
                raise MachineError(f"{flavour.title} finds plan {file} invalid: {reason}", AGAIN)
            found += f"; {file.rpartition('/')[2]} {answer.lower()}"
        return found
    finally:
        device.close()


def _checked(bundle: Bundle, entry: Entry, device: Device, version: str) -> Gpu:
    """Check every receipt; return this machine's GPU. Raises what `plan_file.check` raises."""
    from aapt_deploy.ops.block_causal_attention import kernels

    for name, receipt in entry.receipts.items():
        here = device.gpu(version, kernels.source_hash() if receipt.kernels else "")
        sha256 = plan_file.graph_sha256(bundle.manifest["files"], name)
        plan_file.check(receipt, here, sha256, entry.graphs[name])
    return here


def _scales(bundle: Bundle, file: str) -> list[hopper_fp8.Scales]:
    from aapt_deploy.bundle.scales import load

    return load(bundle.checked(file), bundle.profile).attention
