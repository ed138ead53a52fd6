"""The CUDA kernels of plugins/block_causal_attention, compiled, cached and launched.

    compiled(head_dim)      source -> Compiled: PTX, machine code, the assembler's report
    load(head_dim)          Compiled -> Kernels on the current CUDA context, for torch's op
    launcher(layout, ...)   the same for TensorRT's plugin
    ptx_launch(kernel, ...) PTX and launch shape, for a plan that has the kernels itself

No CUDA toolkit is needed: NVRTC and the driver's bindings are wheels, of the extra [cuda]. They are
imported inside functions, so the tables can be used on a machine without either.

NVRTC's machine code is loaded if the driver is at least as new: its assembler is the checked one.
An older driver gets the PTX, of the oldest version that has every instruction.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from aapt_deploy.errors import MachineError
from aapt_deploy.ops.block_causal_attention.hopper_fp8 import HEAD_DIMS, NAME
from aapt_deploy.ops.block_causal_attention.launches import ABI, DEFAULT, Variant, launch_shape
from aapt_deploy.ops.block_causal_attention.launches import QUERY_ROWS as QUERY_ROWS
from aapt_deploy.ops.block_causal_attention.launches import VARIANTS as VARIANTS
from aapt_deploy.ops.block_causal_attention.launches import Shape as Shape

SM = 90  # Hopper; neither older nor newer GPUs have these instructions
PTX_VERSION = "8.6"
OLDEST_DRIVER = 12070  # of CUDA 12.7, the first to read PTX 8.6
OLDEST_NVRTC = (12, 8)
CHOSEN = "prefetch 8"  # for the torch op: the source's default form, which fits every launch
OPTIONS = (
    "--gpu-architecture=sm_90a", "--std=c++17",
    "--ptxas-options=-v", "--ptxas-options=-warn-spills",
)  # fmt: skip
MAGIC = b"aapt-kernels-1\n"
NO_BINDINGS = "CUDA's Python bindings are not installed"
INSTALL = "pip install 'aapt_deploy[cuda]'"
UPGRADE = "pip install --upgrade 'aapt_deploy[cuda]'"


def source_file() -> Path:
    """Return the path of the source: in an installed package, else in a checkout."""
    packaged = Path(__file__).parents[2] / "plugins"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[3] / "plugins"
    return folder / "block_causal_attention" / "block_causal_attention.cu"


def source_hash() -> str:
    """Return the sha256 of the source, for a plan's receipt."""
    return hashlib.sha256(source_file().read_bytes()).hexdigest()


@dataclass(frozen=True)
class Compiled:
    """The compiled kernels of one head dimension."""

    ptx: bytes  # of version PTX_VERSION
    cubin: bytes
    report: str  # the assembler's: registers, spills, shared memory, warnings
    nvrtc: tuple[int, int]

    def to_bytes(self) -> bytes:
        parts = (self.ptx, self.cubin, self.report.encode(), "{}.{}".format(*self.nvrtc).encode())
        body = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        return MAGIC + hashlib.sha256(body).digest() + body

    @classmethod
    def of(cls, data: bytes) -> "Compiled | None":
        """Parse what `to_bytes` wrote; None if it is damaged."""
        digest, body = data[len(MAGIC) : len(MAGIC) + 32], data[len(MAGIC) + 32 :]
        if not data.startswith(MAGIC) or hashlib.sha256(body).digest() != digest:
            return None
        parts = []
        while body:
            size = int.from_bytes(body[:8], "little")
            parts.append(body[8 : 8 + size])
            body = body[8 + size :]
        major, minor = parts[3].decode().split(".")
        return cls(parts[0], parts[1], parts[2].decode(), (int(major), int(minor)))


def cache_folder() -> Path:
    """Return the folder of compiled kernels."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "aapt_deploy" / "kernels"


def compiled(head_dim: int, folder: Path | None = None, defines: tuple[str, ...] = ()) -> Compiled:
    """Return the kernels for `head_dim` (128 or 64), from the cache if it has them.

    `folder` is the cache, cache_folder() by default. `defines`, as NAME=VALUE, make a `Variant` of
    the source. A damaged file in the cache is compiled again. A cache that cannot be written is
    skipped. Raises MachineError if NVRTC is missing, too old or refuses the source.
    """
    assert head_dim in HEAD_DIMS, f"{head_dim=}"
    nvrtc = _nvrtc()
    version = _version(nvrtc)
    source = source_file().read_bytes()
    made_from = repr((source, OPTIONS, PTX_VERSION, version, head_dim, defines))
    key = hashlib.sha256(made_from.encode()).hexdigest()
    path = (folder or cache_folder()) / f"{key}.bin"
    with contextlib.suppress(OSError):
        if found := Compiled.of(path.read_bytes()):
            return found
    made = _compile(nvrtc, source, head_dim, defines, version)
    _keep(path, made.to_bytes())
    return made


def compile_source(source: bytes, defines: tuple[str, ...] = ()) -> Compiled:
    """Compile another source for the same GPU and PTX version, without the cache.

    Raises MachineError as `compiled` does.
    """
    nvrtc = _nvrtc()
    return _compile(nvrtc, source, HEAD_DIMS[0], defines, _version(nvrtc))


def _keep(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _nvrtc() -> Any:
    """Import NVRTC's bindings; raises MachineError if they are missing."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise MachineError(f"{NO_BINDINGS}: {error}", INSTALL) from None
    return nvrtc


def _version(nvrtc: Any) -> tuple[int, int]:
    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:  # the library is found at the first call
        reason = str(error).splitlines()[0]
        missing = f"NVRTC, which compiles the CUDA kernels, is not installed: {reason}"
        raise MachineError(missing, INSTALL) from None
    if (major, minor) < OLDEST_NVRTC:
        wanted = ".".join(map(str, OLDEST_NVRTC))
        problem = f"NVRTC {major}.{minor} is too old for the CUDA kernels: {wanted} or newer"
        raise MachineError(problem, UPGRADE)
    return int(major), int(minor)


def _compile(
    nvrtc: Any, source: bytes, head_dim: int, defines: tuple[str, ...], version: tuple[int, int]
) -> Compiled:
    def call(function: Any, *arguments: Any) -> Any:
        status, *values = function(*arguments)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            answer = f"{function.__name__} answers {status.name}"
            raise MachineError(f"NVRTC {version[0]}.{version[1]}: {answer}", UPGRADE)
        return values[0] if values else None

    def read(size: Any, get: Any) -> bytes:
        buffer = bytearray(call(size, program))
        call(get, program, buffer)
        return bytes(buffer)

    program = call(nvrtc.nvrtcCreateProgram, source, source_file().name.encode(), 0, [], [])
    macros = [f"-D{define}" for define in (f"AAPT_HEAD_DIM={head_dim}", *defines)]
    options = [option.encode() for option in (*OPTIONS, *macros)]
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        report = log.rstrip(b"\0").decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            first = next((line for line in report.splitlines() if "error" in line), status.name)
            what = f"NVRTC {version[0]}.{version[1]} cannot compile {source_file().name}"
            raise MachineError(f"{what}: {first}", "install the package again")
        ptx = read(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX).rstrip(b"\0")
        cubin = read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Compiled(pinned(ptx), cubin, report, version)


def pinned(ptx: bytes) -> bytes:
    """Rewrite the version of PTX to PTX_VERSION.

    NVRTC writes that of its own release, which older drivers refuse without reading further.
    """
    ours = f".version {PTX_VERSION}".encode()
    rewritten, count = re.subn(rb"(?m)^\.version \d+\.\d+$", ours, ptx)
    assert count == 1, f"{count} .version lines"
    return rewritten


# Running


def check_device(sm: int, name: str, driver: int) -> None:
    """Refuse a GPU of compute capability sm / 10, or a driver of CUDA version `driver` / 1000.

    Raises MachineError if the GPU is not a Hopper, or if the driver is older than the PTX.
    """
    if sm != SM:
        raise MachineError(
            f"GPU {name} has compute capability {sm // 10}.{sm % 10}; "
            "the FP8 attention kernels are for 9.0 (H100, H200)",
            "take a profile whose kv_cache is bf16",
        )
    if driver < OLDEST_DRIVER:
        found, wanted = (f"{v // 1000}.{v % 1000 // 10}" for v in (driver, OLDEST_DRIVER))
        problem = f"the NVIDIA driver supports CUDA {found}; the kernels need {wanted}"
        raise MachineError(problem, "update the driver to release 565 or newer")


class Kernels:
    """The kernels of one head dimension, loaded into the current CUDA context.

    They stay loaded as long as this object exists.
    """

    def __init__(
        self, driver: Any, library: Any, functions: dict[str, Any], attend_bytes: int = 0
    ) -> None:
        """Take `attend_bytes` of dynamic shared memory for launches of aapt_attend."""
        self._driver, self._library, self._functions = driver, library, functions
        self._dynamic_bytes = {"aapt_attend": attend_bytes}

    def __call__(
        self, kernel: str, inputs: Sequence[int], numbers: Sequence[int], outputs: Sequence[int],
        stream: int,
    ) -> None:  # fmt: skip
        """Queue `kernel` on `stream`, with device addresses and numbers in the order of its ABI.

        It allocates nothing and never synchronises, so it may run inside a stream capture. Raises
        MachineError if the launch is refused.
        """
        abi, given = ABI[kernel], tuple(map(len, (inputs, numbers, outputs)))
        assert given == tuple(map(len, abi)), f"{kernel} takes {abi}"
        shape = launch_shape(kernel, numbers[0], numbers[1])  # T, H
        address, number = ctypes.c_uint64, ctypes.c_int32
        values = [*map(address, inputs), *map(number, numbers), *map(address, outputs)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        _call(
            self._driver, self._driver.cuLaunchKernel, self._functions[kernel],
            shape.x, shape.y, 1, shape.threads, 1, 1, self._dynamic_bytes.get(kernel, 0), stream,
            ctypes.addressof(pointers), 0,
        )  # fmt: skip

    def close(self) -> None:
        _call(self._driver, self._driver.cuLibraryUnload, self._library)


@functools.cache
def load(head_dim: int, variant: Variant = DEFAULT) -> Kernels:
    """Load the kernels for `head_dim` on the current device; see `compiled`.

    It needs a current CUDA context, which torch and TensorRT both make. Raises MachineError if the
    GPU is not a Hopper, if the driver is too old, and as `compiled` does.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise MachineError(f"{NO_BINDINGS}: {error}", INSTALL) from None
    call = functools.partial(_call, driver)
    try:
        call(driver.cuInit, 0)
    except RuntimeError as error:  # the library is found at the first call
        hint = "install the driver; aapt doctor tells what else is missing"
        raise MachineError(f"no NVIDIA driver: {str(error).splitlines()[0]}", hint) from None
    device, newest = call(driver.cuCtxGetDevice), int(call(driver.cuDriverGetVersion))
    prefix, attributes = "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY", driver.CUdevice_attribute
    major, minor = (
        int(call(driver.cuDeviceGetAttribute, getattr(attributes, f"{prefix}_{part}"), device))
        for part in ("MAJOR", "MINOR")
    )
    name = call(driver.cuDeviceGetName, 128, device).rstrip(b"\0").decode()
    check_device(10 * major + minor, name, newest)
    code = compiled(head_dim, None, variant.defines(head_dim))
    image = code.cubin if newest >= 1000 * code.nvrtc[0] + 10 * code.nvrtc[1] else code.ptx + b"\0"
    library = call(driver.cuLibraryLoadData, image, [], [], 0, [], [], 0)
    found = {name: call(driver.cuLibraryGetKernel, library, name.encode()) for name in ABI}
    dynamic_bytes = variant.dynamic_bytes(head_dim)
    if dynamic_bytes:  # above 48 KB it must be allowed first
        allowed = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        call(driver.cuKernelSetAttribute, allowed, dynamic_bytes, found["aapt_attend"], device)
    functions = {name: call(driver.cuKernelGetFunction, kernel) for name, kernel in found.items()}
    return Kernels(driver, library, functions, dynamic_bytes)


def launcher(layout: str, head_dim: int) -> Kernels:
    """Load the kernels of one cache layout, for the plugin.

    Raises MachineError if the layout has no kernels, and as `load` does.
    """
    if layout != NAME:
        hint = "build with TensorRT's own attention: --attention native"
        raise MachineError(f"there are no kernels for caches in layout {layout}", hint)
    return load(head_dim)


class PtxLaunch(NamedTuple):
    """A kernel for fixed sizes, for a plan. Its shared memory is static."""

    name: str
    ptx: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]


def ptx_launch(kernel: str, tokens: int, heads: int, head_dim: int) -> PtxLaunch:
    """Return `kernel` for a block of T tokens and H heads, without a GPU.

    Raises MachineError as `compiled` does.
    """
    shape, ptx = launch_shape(kernel, tokens, heads), compiled(head_dim).ptx.decode()
    return PtxLaunch(kernel, ptx, (shape.x, shape.y, 1), (shape.threads, 1, 1))


def _call(driver: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    status, *values = function(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        hint = "aapt doctor tells what this machine lacks"
        raise MachineError(f"CUDA: {function.__name__} answers {status.name}", hint)
    return values[0] if values else None
