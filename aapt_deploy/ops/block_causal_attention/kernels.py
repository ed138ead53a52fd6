"""The CUDA kernels of plugins/block_causal_attention: their ABI and launch shapes, compiled by NVRTC, kept in a cache, loaded through the driver.

    compiled(head_dim)    source -> Compiled (PTX, machine code, the assembler's report); from the cache where it was compiled before
    load(head_dim)        Compiled -> Kernels on the current CUDA context; `Kernels` is what TensorRT's plugin and the torch op launch with
    launcher(layout, ...) the same as the plugin asks for it; ptx_launch(kernel, ...) PTX and launch shape, for a plan that holds the kernels itself

No CUDA toolkit is needed: NVRTC and the driver bindings come as wheels (`pip install 'aapt_deploy[cuda]'`). They are imported inside functions, so
this module can be read, and its tables used, on a machine that has neither.

Machine code of NVRTC is loaded where the driver is at least as new, because its assembler is the one that was checked. An older driver gets the PTX,
whose version is pinned to the oldest that knows every instruction in it.
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
from aapt_deploy.ops.block_causal_attention.hopper_fp8 import HEAD_DIMS, NAME, TILE_KEYS, tiles

SM = 90  # Hopper; the instructions exist nowhere else, so nothing newer can run them either
PTX_VERSION = "8.6"
OLDEST_DRIVER = 12070  # of CUDA 12.7, the first to read PTX 8.6
OLDEST_NVRTC = (12, 8)
QUERY_ROWS = 128  # of one thread block of aapt_attend
OPTIONS = (
    "--gpu-architecture=sm_90a",
    "--std=c++17",
    "--ptxas-options=-v",
    "--ptxas-options=-warn-spills",
)
MAGIC = b"aapt-kernels-1\n"


class Abi(NamedTuple):
    """Parameters of one kernel in their order: device pointers, int32 numbers, device pointers (the flat ABI of TensorRT's AOT plugins)."""

    inputs: tuple[str, ...]
    numbers: tuple[str, ...]
    outputs: tuple[str, ...]


ABI = {
    "aapt_pack": Abi(
        ("k", "v", "k_scale", "k_mean", "v_scale"), ("T", "H"), ("k_block", "v_block")
    ),
    "aapt_attend": Abi(
        (
            "q",
            "k_block",
            "v_block",
            "k_cache",
            "v_cache",
            "cache_len",
            "q_scale",
            "k_scale",
            "v_scale",
        ),
        ("T", "H", "cache_tiles"),
        ("out",),
    ),
    "aapt_commit": Abi(
        ("k_block", "v_block", "slot"), ("T", "H", "cache_tiles"), ("k_cache", "v_cache")
    ),
}


class Variant(NamedTuple):
    """A form of aapt_attend. All forms compute the same bits; what differs is how tiles arrive."""

    deep: bool = False  # a ring of 90 KB, in place of one within 48
    dynamic: bool = False  # the ring in dynamic shared memory, which the launch asks for
    prefetch: int = 8  # visits by which tiles are copied to L2 ahead of their use; 0: never
    loads_first: bool = True  # all queries are loaded before the first is divided

    def ring(self, head_dim: int) -> tuple[int, int]:
        """Tiles of K and of V that shared memory holds."""
        k, v = (6, 5) if self.deep else (3, 2)
        return (k, v) if head_dim == 128 else (2 * k, 2 * v)

    def defines(self, head_dim: int) -> tuple[str, ...]:
        """Macros of the source, as NAME=VALUE; none for the form that the source has by itself."""
        if self == Variant():
            return ()
        k, v = self.ring(head_dim)
        return (
            f"AAPT_RING_K={k}", f"AAPT_RING_V={v}", f"AAPT_DYNAMIC={self.dynamic:d}",
            f"AAPT_PREFETCH={self.prefetch}", f"AAPT_LOADS_FIRST={self.loads_first:d}",
        )  # fmt: skip

    def dynamic_bytes(self, head_dim: int) -> int:
        """Dynamic shared memory of a launch: tiles, their barriers, and room to align them."""
        return sum(self.ring(head_dim)) * (TILE_KEYS * head_dim + 16) + 1024 if self.dynamic else 0


# By name, for comparison in one run (bench/attention.py); the first is the plainest.
VARIANTS = {
    "as first written": Variant(prefetch=0, loads_first=False),
    "loads first": Variant(prefetch=0),
    "prefetch 8": Variant(),
    "K6V5": Variant(deep=True, dynamic=True, prefetch=0),
    "K6V5, prefetch 8": Variant(deep=True, dynamic=True),
    "K6V5 static": Variant(deep=True, prefetch=0),
}
# What `attend` of the torch op launches. No GPU has timed any of them yet, so it is the default
# form of the source, which fits every launch.
CHOSEN = "prefetch 8"


class Shape(NamedTuple):
    """How a kernel is launched: thread blocks along x and y, threads of each."""

    x: int
    y: int
    threads: int


def launch_shape(kernel: str, tokens: int, heads: int) -> Shape:
    """The launch of `kernel` for a block of T tokens and H heads."""
    if kernel == "aapt_attend":
        return Shape(-(-tokens // QUERY_ROWS), heads, 384)
    return Shape(
        tiles(tokens) + (kernel == "aapt_commit"), heads, 256
    )  # a block that begins inside a tile touches one more


def source_file() -> Path:
    """The kernels' source: inside an installed package, else in a checkout."""
    packaged = Path(__file__).parents[2] / "plugins"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[3] / "plugins"
    return folder / "block_causal_attention" / "block_causal_attention.cu"


def source_hash() -> str:
    """sha256 of the source: what a plan's receipt holds."""
    return hashlib.sha256(source_file().read_bytes()).hexdigest()


@dataclass(frozen=True)
class Compiled:
    """One head dimension's kernels."""

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
        """What `to_bytes` wrote, or None when it is damaged."""
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
    """Where compiled kernels are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "aapt_deploy" / "kernels"


def compiled(head_dim: int, folder: Path | None = None, defines: tuple[str, ...] = ()) -> Compiled:
    """The kernels for `head_dim` (128 or 64), from `folder` (cache_folder() by default) or freshly compiled into it.

    `defines`, as NAME=VALUE, make a variant of the source; see `Variant`.
    A damaged file in the cache is compiled again; a cache that cannot be written is done without. Raises MachineError when NVRTC is missing or too
    old, or refuses the source.
    """
    assert head_dim in HEAD_DIMS, f"{head_dim=}"
    nvrtc = _nvrtc()
    version = _version(nvrtc)
    source = source_file().read_bytes()
    key = hashlib.sha256(
        repr((source, OPTIONS, PTX_VERSION, version, head_dim, defines)).encode()
    ).hexdigest()
    path = (folder or cache_folder()) / f"{key}.bin"
    try:
        found = Compiled.of(path.read_bytes())
    except OSError:
        found = None
    if found is None:
        found = _compile(nvrtc, source, head_dim, defines, version)
        _keep(path, found.to_bytes())
    return found


def compile_source(source: bytes, defines: tuple[str, ...] = ()) -> Compiled:
    """Another source for the same GPU and PTX version, not kept: the doctor's own small kernels. Raises MachineError as `compiled` does."""
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
    """The bindings of NVRTC, its library found."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise MachineError(
            f"CUDA's Python bindings are not installed: {error}", "pip install 'aapt_deploy[cuda]'"
        ) from None
    return nvrtc


def _version(nvrtc: Any) -> tuple[int, int]:
    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:  # the library is found at the first call
        reason = str(error).splitlines()[0]
        raise MachineError(
            f"NVRTC, which compiles the CUDA kernels, is not installed: {reason}",
            "pip install 'aapt_deploy[cuda]'",
        ) from None
    if (major, minor) < OLDEST_NVRTC:
        wanted = ".".join(map(str, OLDEST_NVRTC))
        raise MachineError(
            f"NVRTC {major}.{minor} is too old for the CUDA kernels: {wanted} or newer",
            "pip install --upgrade 'aapt_deploy[cuda]'",
        )
    return int(major), int(minor)


def _compile(
    nvrtc: Any, source: bytes, head_dim: int, defines: tuple[str, ...], version: tuple[int, int]
) -> Compiled:
    def call(function: Any, *arguments: Any) -> Any:
        status, *values = function(*arguments)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise MachineError(
                f"NVRTC {version[0]}.{version[1]}: {function.__name__} answers {status.name}",
                "pip install --upgrade 'aapt_deploy[cuda]'",
            )
        return values[0] if values else None

    def read(size: Any, get: Any) -> bytes:
        buffer = bytearray(call(size, program))
        call(get, program, buffer)
        return bytes(buffer)

    program = call(nvrtc.nvrtcCreateProgram, source, source_file().name.encode(), 0, [], [])
    options = [
        option.encode()
        for option in (
            *OPTIONS,
            f"-DAAPT_HEAD_DIM={head_dim}",
            *(f"-D{define}" for define in defines),
        )
    ]
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        report = (
            read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
            .rstrip(b"\0")
            .decode(errors="replace")
        )
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            first = next((line for line in report.splitlines() if "error" in line), status.name)
            raise MachineError(
                f"NVRTC {version[0]}.{version[1]} cannot compile {source_file().name}: {first}",
                "install the package again",
            )
        ptx = read(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX).rstrip(b"\0")
        cubin = read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Compiled(pinned(ptx), cubin, report, version)


def pinned(ptx: bytes) -> bytes:
    """PTX that calls itself PTX_VERSION: NVRTC writes its own release's, which older drivers refuse without looking further."""
    rewritten, count = re.subn(
        rb"(?m)^\.version \d+\.\d+$", f".version {PTX_VERSION}".encode(), ptx
    )
    assert count == 1, f"{count} .version lines"
    return rewritten


# Running


def check_device(sm: int, name: str, driver: int) -> None:
    """Raise MachineError for a GPU of compute capability sm / 10 that is no Hopper, or a driver (CUDA version x 1000) older than the PTX."""
    if sm != SM:
        raise MachineError(
            f"GPU {name} has compute capability {sm // 10}.{sm % 10}; the FP8 attention kernels are for 9.0 (H100, H200)",
            "take a profile whose kv_cache is bf16",
        )
    if driver < OLDEST_DRIVER:
        found, wanted = (f"{v // 1000}.{v % 1000 // 10}" for v in (driver, OLDEST_DRIVER))
        raise MachineError(
            f"the NVIDIA driver supports CUDA {found}; the kernels need {wanted}",
            "update the driver to release 565 or newer",
        )


class Kernels:
    """The kernels of one head dimension, loaded into the current CUDA context. Stays loaded as long as this object lives."""

    def __init__(
        self,
        driver: Any,
        library: Any,
        functions: dict[str, Any],
        attend_bytes: int = 0,
    ) -> None:
        """`attend_bytes`: dynamic shared memory of aapt_attend's launches."""
        self._driver, self._library, self._functions = driver, library, functions
        self._dynamic_bytes = {"aapt_attend": attend_bytes}

    def __call__(
        self,
        kernel: str,
        inputs: Sequence[int],
        numbers: Sequence[int],
        outputs: Sequence[int],
        stream: int,
    ) -> None:
        """Queue `kernel` on `stream`: device addresses and numbers in the order of its ABI; T and H are the first numbers of each.

        Allocates nothing and never synchronises, so it may run inside a stream capture. Raises MachineError when the launch is refused.
        """
        abi = ABI[kernel]
        assert tuple(map(len, (inputs, numbers, outputs))) == tuple(map(len, abi)), (
            f"{kernel} takes {abi}"
        )
        shape = launch_shape(kernel, numbers[0], numbers[1])
        values = [
            *map(ctypes.c_uint64, inputs),
            *map(ctypes.c_int32, numbers),
            *map(ctypes.c_uint64, outputs),
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        _call(
            self._driver, self._driver.cuLaunchKernel, self._functions[kernel],
            shape.x, shape.y, 1, shape.threads, 1, 1, self._dynamic_bytes.get(kernel, 0), stream,
            ctypes.addressof(pointers), 0,
        )  # fmt: skip

    def close(self) -> None:
        _call(self._driver, self._driver.cuLibraryUnload, self._library)


@functools.cache
def load(head_dim: int, variant: Variant = Variant()) -> Kernels:
    """The kernels for `head_dim` on the current device; see `compiled`. Needs a current CUDA context, which torch and TensorRT both make.

    Raises MachineError for a GPU that is no Hopper, a driver that is too old, and what `compiled` raises.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise MachineError(
            f"CUDA's Python bindings are not installed: {error}", "pip install 'aapt_deploy[cuda]'"
        ) from None
    call = functools.partial(_call, driver)
    try:
        call(driver.cuInit, 0)
    except RuntimeError as error:  # the library is found at the first call
        raise MachineError(
            f"no NVIDIA driver: {str(error).splitlines()[0]}",
            "install the driver; aapt doctor tells what else is missing",
        ) from None
    device, newest = call(driver.cuCtxGetDevice), int(call(driver.cuDriverGetVersion))
    attribute = driver.CUdevice_attribute
    major, minor = (
        call(driver.cuDeviceGetAttribute, key, device)
        for key in (
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    check_device(
        10 * int(major) + int(minor),
        call(driver.cuDeviceGetName, 128, device).rstrip(b"\0").decode(),
        newest,
    )
    code = compiled(head_dim, None, variant.defines(head_dim))
    image = code.cubin if newest >= 1000 * code.nvrtc[0] + 10 * code.nvrtc[1] else code.ptx + b"\0"
    library = call(driver.cuLibraryLoadData, image, [], [], 0, [], [], 0)
    found = {name: call(driver.cuLibraryGetKernel, library, name.encode()) for name in ABI}
    dynamic_bytes = variant.dynamic_bytes(head_dim)
    if dynamic_bytes:  # above 48 KB a kernel has to be allowed
        allowed = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        call(driver.cuKernelSetAttribute, allowed, dynamic_bytes, found["aapt_attend"], device)
    functions = {name: call(driver.cuKernelGetFunction, kernel) for name, kernel in found.items()}
    return Kernels(driver, library, functions, dynamic_bytes)


def launcher(layout: str, head_dim: int) -> Kernels:
    """What python_plugin.register wants: the kernels of one cache layout, loaded. Raises MachineError for a layout without kernels, and as `load`."""
    if layout != NAME:
        raise MachineError(
            f"there are no kernels for caches in layout {layout}",
            "build with TensorRT's own attention: --attention native",
        )
    return load(head_dim)


class PtxLaunch(NamedTuple):
    """A kernel for fixed sizes, as a plan may hold it. Its shared memory is static."""

    name: str
    ptx: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]


def ptx_launch(kernel: str, tokens: int, heads: int, head_dim: int) -> PtxLaunch:
    """`kernel` for a block of T tokens and H heads. Needs NVRTC and no GPU; raises what `compiled` raises."""
    shape = launch_shape(kernel, tokens, heads)
    return PtxLaunch(
        kernel, compiled(head_dim).ptx.decode(), (shape.x, shape.y, 1), (shape.threads, 1, 1)
    )


def _call(driver: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    status, *values = function(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise MachineError(
            f"CUDA: {function.__name__} answers {status.name}",
            "aapt doctor tells what this machine lacks",
        )
    return values[0] if values else None
