"""The CUDA kernels without a GPU.

They compile for Hopper, fit its registers and memory, keep the order that makes them fast, and have
the flat ABI.
"""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import triton

from aapt_deploy.errors import MachineError
from aapt_deploy.ops.block_causal_attention import kernels
from aapt_deploy.ops.block_causal_attention.hopper_fp8 import HEAD_DIMS
from aapt_deploy.ops.block_causal_attention.kernels import ABI, Compiled, Shape

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = 48 * 1024  # static shared memory that any launch may have
REGISTERS = {
    "aapt_attend": 168,
    "aapt_pack": 64,
    "aapt_commit": 64,
}  # 65536 / 384 threads, in eights; the others run four blocks to an SM


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module", params=HEAD_DIMS, ids=lambda dim: f"D{dim}")
def code(request: pytest.FixtureRequest, folder: Path) -> Compiled:
    return kernels.compiled(request.param, folder)


def test_the_assembler_reports_no_spill_no_stack_and_no_warning(code: Compiled) -> None:
    assert code.report.count(
        "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    ) == len(ABI), code.report
    words = ("warning", "serializ", "C7508", "C7510", "Potential Performance Loss")
    assert not [
        line
        for line in code.report.splitlines()
        if any(word.lower() in line.lower() for word in words)
    ], code.report


OTHERS = [(name, 128) for name, made in kernels.VARIANTS.items() if made != kernels.Variant()]


@pytest.mark.parametrize(("name", "dim"), [*OTHERS, ("K6V5, prefetch 8", 64)])
def test_every_variant_assembles_well(name: str, dim: int, folder: Path, tmp_path: Path) -> None:
    """Registers, spills, serialised products, shared memory, and the order of its loop."""
    variant = kernels.VARIANTS[name]
    made = kernels.compiled(dim, folder, variant.defines(dim))
    test_the_assembler_reports_no_spill_no_stack_and_no_warning(made)
    used = dict(re.findall(r"entry function '(\w+)'(?:.|\n)*?Used (\d+) registers", made.report))
    assert int(used["aapt_attend"]) <= REGISTERS["aapt_attend"]
    static = [int(size) for size in re.findall(r"(\d+) bytes smem", made.report)]
    if variant.dynamic:
        assert static == [] and SHARED_LIMIT < variant.dynamic_bytes(dim) <= 227 * 1024
    else:
        tiles, size = sum(variant.ring(dim)), 64 * dim
        assert static == [tiles * (size + 16)] and (static[0] > SHARED_LIMIT) == variant.deep
    test_the_loops_exponentials_run_while_products_do(made, tmp_path)
    found = [i.split()[0] for i in instructions(made, tmp_path)]
    prefetches = sum(kind.startswith("UBLKPF") for kind in found)
    assert prefetches == (2 if variant.prefetch else 0)


def test_queries_are_loaded_before_the_first_is_divided(folder: Path, tmp_path: Path) -> None:
    """A division's reciprocal stands behind all loads of a thread's queries, or among them."""
    early = {}
    for name in ("as first written", "loads first"):
        made = kernels.compiled(128, folder, kernels.VARIANTS[name].defines(128))
        kinds = [i.split()[0] for i in instructions(made, tmp_path)]
        loads = [at for at, kind in enumerate(kinds) if kind.startswith("LDG.E.64")]
        assert len(loads) == 16
        early[name] = sum("MUFU.RCP" in kind for kind in kinds[loads[0] : loads[-1]])
    assert early["loads first"] == 0 < early["as first written"]


def test_a_name_that_is_chosen_is_a_variant_that_fits_every_launch() -> None:
    variant = kernels.VARIANTS[kernels.CHOSEN]
    assert not variant.deep and variant.dynamic_bytes(128) == variant.dynamic_bytes(64) == 0


def test_registers_and_shared_memory_are_within_budget(code: Compiled) -> None:
    used = dict(re.findall(r"entry function '(\w+)'(?:.|\n)*?Used (\d+) registers", code.report))
    assert used.keys() == ABI.keys()
    assert {name: int(count) for name, count in used.items() if int(count) > REGISTERS[name]} == {}
    (shared,) = re.findall(r"(\d+) bytes smem", code.report)
    assert 32 * 1024 < int(shared) <= SHARED_LIMIT


def test_parameters_are_the_flat_abi(code: Compiled) -> None:
    """Pointers, 32-bit numbers, pointers: as many of each as the table says, in its order."""
    entries = dict(re.findall(r"\.visible \.entry (\w+)\(([^)]*)\)", code.ptx.decode()))
    assert entries.keys() == ABI.keys()
    for name, parameters in entries.items():
        kinds = re.findall(r"\.param \.(\w+)", parameters)
        abi = ABI[name]
        assert kinds == ["u64"] * len(abi.inputs) + ["u32"] * len(abi.numbers) + ["u64"] * len(
            abi.outputs
        )


def test_a_plan_may_hold_the_kernels_with_their_launches(
    code: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "compiled", lambda head_dim: code)
    for name in ("aapt_pack", "aapt_attend"):
        shape, launch = kernels.launch_shape(name, 300, 3), kernels.ptx_launch(name, 300, 3, 64)
        assert (launch.grid, launch.block) == ((shape.x, shape.y, 1), (shape.threads, 1, 1))
        assert f".entry {launch.name}(" in launch.ptx and launch.ptx.startswith("//")


def test_a_layout_without_kernels_is_refused() -> None:
    with pytest.raises(MachineError, match="no kernels for caches in layout token_major") as caught:
        kernels.launcher("token_major", 64)
    assert "--attention native" in caught.value.hint


def test_the_source_names_its_parameters_as_the_table_does() -> None:
    source = kernels.source_file().read_text()
    for name, abi in ABI.items():
        (parameters,) = re.findall(rf"\n{name}\(([^)]*)\)", source)
        names = tuple(
            re.split(r"[ *]+", parameter.strip())[-1] for parameter in parameters.split(",")
        )
        assert names == abi.inputs + abi.numbers + abi.outputs


def test_pinned_ptx_assembles_for_hopper(code: Compiled, tmp_path: Path) -> None:
    """By another assembler than NVRTC's own, which takes the pinned version at its word."""
    assert (
        f"\n.version {kernels.PTX_VERSION}\n" in code.ptx.decode()
        and "\n.target sm_90a\n" in code.ptx.decode()
    )
    (tmp_path / "k.ptx").write_bytes(code.ptx)
    command = [
        TOOLS / "ptxas",
        "-arch=sm_90a",
        "-v",
        tmp_path / "k.ptx",
        "-o",
        tmp_path / "k.cubin",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "serializ" not in done.stderr.lower() and done.stderr.count(
        "0 bytes spill stores, 0 bytes spill loads"
    ) == len(ABI), done.stderr


def instructions(code: Compiled, folder: Path) -> list[str]:
    """Machine instructions of aapt_attend in their order, bare."""
    (folder / "k.cubin").write_bytes(code.cubin)
    text = subprocess.run(
        [TOOLS / "nvdisasm", "-c", folder / "k.cubin"], capture_output=True, text=True, check=True
    ).stdout
    body = text[text.index(".text.aapt_attend:") :]
    body = body[: body.index(".section")] if ".section" in body else body
    return [
        match.group(1).strip()
        for match in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]*[^;]*);", body)
    ]


def test_the_loops_exponentials_run_while_products_do(code: Compiled, tmp_path: Path) -> None:
    """The loop keeps the order that lets products and exponentials overlap.

    Scores are issued, then P.V; after the wait for the scores come the whole softmax's
    exponentials, then the wait for P.V. An assembler that moves them behind the second wait costs
    the overlap, and no result would tell.
    """
    found = instructions(code, tmp_path)
    kinds = [
        i.split()[0].split(".")[0] + (" " + i.rsplit(" ", 1)[-1] if "DEPBAR" in i else "")
        for i in found
    ]
    wait_one = [at for at, kind in enumerate(kinds) if kind == "WARPGROUP 0x1"]
    assert len(wait_one) == 1, "one loop, waiting once with a group left"
    start = wait_one[0]
    end = next(at for at in range(start, len(kinds)) if kinds[at] == "WARPGROUP 0x0")
    exponentials = sum(kind == "MUFU" for kind in kinds[start:end])
    assert exponentials == 32 + 2, (
        f"{exponentials} between the waits: 32 scores of a thread and two rescales belong there"
    )
    products = [at for at in range(start) if kinds[at] == "QGMMA"]
    assert sum(at > max(i for i in range(start) if kinds[i] == "MUFU") for at in products) >= 4, (
        "the products are issued before the wait, in one go"
    )


# --- the cache ---


def test_a_second_build_comes_from_the_cache(
    folder: Path, code: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_compile", lambda *_: pytest.fail("compiled again"))
    dim = 128 if b"D = 128" in code.ptx else 64
    assert kernels.compiled(dim, folder) == code
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:300] + b"x" + data[301:],
        lambda data: b"",
        lambda data: b"MZ" + data,
    ],
)
def test_a_damaged_cache_is_compiled_again(
    folder: Path, code: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: object
) -> None:
    dim = 128 if b"D = 128" in code.ptx else 64
    for file in folder.glob("*.bin"):
        (tmp_path / file.name).write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    compiled = []
    monkeypatch.setattr(kernels, "_compile", lambda *given: compiled.append(given) or code)  # type: ignore[func-returns-value]
    assert kernels.compiled(dim, tmp_path) == code and len(compiled) == 1
    assert kernels.compiled(dim, tmp_path) == code and len(compiled) == 1, (
        "the cache is whole again"
    )


def test_a_cache_that_cannot_be_written_is_done_without(
    code: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(kernels, "_compile", lambda *_: code)
    assert kernels.compiled(128, tmp_path / "file" / "folder") == code


def test_another_source_is_another_entry(
    code: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(kernels, "_compile", lambda *given: compiled.append(given) or code)  # type: ignore[func-returns-value]
    kernels.compiled(128, tmp_path)
    kernels.compiled(64, tmp_path)
    changed = tmp_path / "k.cu"
    changed.write_text(kernels.source_file().read_text() + "\n// changed\n")
    monkeypatch.setattr(kernels, "source_file", lambda: changed)
    kernels.compiled(128, tmp_path)
    assert len(compiled) == len(list(tmp_path.glob("*.bin"))) == 3


def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernels.cache_folder() == tmp_path / "aapt_deploy" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert kernels.cache_folder() == Path.home() / ".cache" / "aapt_deploy" / "kernels"


# --- what can be wrong with a machine ---


@pytest.mark.parametrize(
    ("sm", "driver", "words"),
    [
        (80, 13000, "compute capability 8.0; the FP8 attention kernels are for 9.0"),
        (100, 13000, "compute capability 10.0"),
        (90, 12040, "supports CUDA 12.4; the kernels need 12.7"),
    ],
)
def test_a_machine_that_cannot_run_them_is_told_so(sm: int, driver: int, words: str) -> None:
    with pytest.raises(MachineError, match=re.escape(words)) as caught:
        kernels.check_device(sm, "Some GPU", driver)
    assert caught.value.hint
    kernels.check_device(90, "H100", 12070)


def test_a_source_that_does_not_compile_is_named_with_the_compilers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "k.cu"
    broken.write_text("__global__ void f() { nonsense; }")
    monkeypatch.setattr(kernels, "source_file", lambda: broken)
    with pytest.raises(MachineError, match=r"cannot compile k\.cu: .*nonsense"):
        kernels.compiled(128, tmp_path)
    assert not list(tmp_path.glob("*.bin"))


def test_without_the_wheels_the_way_to_get_them_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    for call in (lambda: kernels.compiled(128, tmp_path), lambda: kernels.load.__wrapped__(128)):
        with pytest.raises(MachineError) as caught:
            call()
        assert "aapt_deploy[cuda]" in caught.value.hint


def test_without_the_library_or_with_an_old_one() -> None:
    class Nvrtc:
        def __init__(self, answer: object) -> None:
            self.answer = answer

        def nvrtcVersion(self) -> object:
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    with pytest.raises(
        MachineError, match="NVRTC, which compiles the CUDA kernels, is not installed: no libnvrtc"
    ):
        kernels._version(Nvrtc(RuntimeError("no libnvrtc\nmore")))
    with pytest.raises(MachineError, match=r"NVRTC 12\.4 is too old"):
        kernels._version(Nvrtc((0, 12, 4)))
    assert kernels._version(Nvrtc((0, 13, 0))) == (13, 0)


# --- launches ---


@pytest.mark.parametrize(
    ("kernel", "tokens", "shape"),
    [
        ("aapt_attend", 1, Shape(1, 24, 384)), ("aapt_attend", 128, Shape(1, 24, 384)),
        ("aapt_attend", 1196, Shape(10, 24, 384)), ("aapt_pack", 64, Shape(1, 24, 256)),
        ("aapt_pack", 65, Shape(2, 24, 256)), ("aapt_commit", 64, Shape(2, 24, 256)),
    ],
)  # fmt: skip
def test_launch_shapes(kernel: str, tokens: int, shape: Shape) -> None:
    assert kernels.launch_shape(kernel, tokens, 24) == shape


def test_a_large_ring_is_allowed_first(code: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamic shared memory above 48 KB is refused at the launch otherwise."""
    from cuda.bindings import driver as true

    calls: list[tuple[object, ...]] = []
    done = true.CUresult.CUDA_SUCCESS
    answers = {
        "cuCtxGetDevice": (3,),
        "cuDriverGetVersion": (13000,),
        "cuDeviceGetName": (b"H200",),
        "cuLibraryLoadData": ("library",),
    }

    class Fake:
        CUresult, CUdevice_attribute = true.CUresult, true.CUdevice_attribute
        CUfunction_attribute = true.CUfunction_attribute

        def __getattr__(self, name: str) -> object:
            def call(*given: object) -> tuple[object, ...]:
                calls.append((name, *given))
                if name == "cuDeviceGetAttribute":
                    return done, 9 if "MAJOR" in str(given[0]) else 0
                if name in ("cuLibraryGetKernel", "cuKernelGetFunction"):
                    return done, f"{name} {given[-1]}"
                return done, *answers.get(name, ())

            call.__name__ = name
            return call

    monkeypatch.setattr("cuda.bindings.driver", Fake())
    monkeypatch.setattr(kernels, "compiled", lambda *_: code)
    kernels.load.__wrapped__(128)
    assert not [call for call in calls if call[0] == "cuKernelSetAttribute"]
    kernels.load.__wrapped__(128, kernels.VARIANTS["K6V5"])
    (allowed,) = (call for call in calls if call[0] == "cuKernelSetAttribute")
    what = true.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert allowed[1:] == (what, 11 * (8192 + 16) + 1024, "cuLibraryGetKernel b'aapt_attend'", 3)
    after = calls[calls.index(allowed) :]
    assert ("cuKernelGetFunction", "cuLibraryGetKernel b'aapt_attend'") in after


class Driver:
    """Stands where the driver does and reads the parameters of a launch as the driver would."""

    class CUresult:
        CUDA_SUCCESS = type("Status", (), {"name": "CUDA_SUCCESS"})
        CUDA_ERROR_INVALID_VALUE = type("Status", (), {"name": "CUDA_ERROR_INVALID_VALUE"})

    def __init__(self, status: str = "CUDA_SUCCESS") -> None:
        self.status, self.seen = getattr(self.CUresult, status), []

    def cuLaunchKernel(self, function: str, *given: int) -> tuple[object]:
        import ctypes

        *shape, stream, parameters, extra = given
        sizes = [8] * 9 + [4] * 3 + [8]
        pointers = (ctypes.c_void_p * len(sizes)).from_address(parameters)
        self.seen.append(
            (
                function,
                tuple(shape),
                stream,
                [
                    int.from_bytes(ctypes.string_at(p, n), "little")
                    for p, n in zip(pointers, sizes, strict=False)
                ],
            )
        )  # type: ignore[arg-type]
        assert extra == 0
        return (self.status,)


def test_a_launch_passes_addresses_and_numbers_in_the_order_of_the_abi() -> None:
    driver = Driver()
    run = kernels.Kernels(driver, None, {"aapt_attend": "F"})
    addresses = [0x7F00_0000_0000 + 256 * i for i in range(9)]
    run("aapt_attend", addresses, (1196, 24, 600), [0x7E00_0000_0000], 77)
    assert driver.seen == [
        ("F", (10, 24, 1, 384, 1, 1, 0), 77, [*addresses, 1196, 24, 600, 0x7E00_0000_0000])
    ]
    with pytest.raises(AssertionError, match="aapt_attend takes"):
        run("aapt_attend", addresses[:-1], (1196, 24, 600), [0], 77)
    deep = kernels.Kernels(driver, None, {"aapt_attend": "F"}, 91_312)
    deep("aapt_attend", addresses, (1196, 24, 600), [0x7E00_0000_0000], 77)
    assert driver.seen[-1][1] == (10, 24, 1, 384, 1, 1, 91_312)
    refused = kernels.Kernels(Driver("CUDA_ERROR_INVALID_VALUE"), None, {"aapt_attend": "F"})
    with pytest.raises(MachineError, match="cuLaunchKernel answers CUDA_ERROR_INVALID_VALUE"):
        refused("aapt_attend", addresses, (1196, 24, 600), [0], 77)


def test_unloading_and_a_refusal_name_the_drivers_function() -> None:
    class Unloading(Driver):
        def cuLibraryUnload(self, library: str) -> tuple[object]:
            self.seen.append(library)
            return (self.status,)

    driver = Unloading()
    kernels.Kernels(driver, "library", {}).close()
    assert driver.seen == ["library"]
    refused = kernels.Kernels(Unloading("CUDA_ERROR_INVALID_VALUE"), "library", {})
    with pytest.raises(MachineError, match="CUDA: cuLibraryUnload answers CUDA_ERROR") as caught:
        refused.close()
    assert caught.value.hint == "aapt doctor tells what this machine lacks"


def test_without_a_driver_the_fix_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(flags: int) -> None:
        assert flags == 0
        raise RuntimeError("Failed to dlopen libcuda.so.1\nmore of it")

    monkeypatch.setattr("cuda.bindings.driver", SimpleNamespace(cuInit=missing))
    told = r"^no NVIDIA driver: Failed to dlopen libcuda\.so\.1$"
    with pytest.raises(MachineError, match=told) as caught:
        kernels.load.__wrapped__(128)
    assert caught.value.hint == "install the driver; aapt doctor tells what else is missing"


def test_another_source_is_compiled_for_the_same_gpu_without_the_cache() -> None:
    made = kernels.compile_source(
        b'extern "C" __global__ void f(int* x) { *x = NUMBER; }', ("NUMBER=42",)
    )
    ptx = made.ptx.decode()
    assert f"\n.version {kernels.PTX_VERSION}\n" in ptx and ".target sm_90a" in ptx
    assert ".entry f(" in ptx and "42" in ptx and made.cubin and made.nvrtc >= kernels.OLDEST_NVRTC
    with pytest.raises(MachineError, match=r"cannot compile .*NUMBER"):
        kernels.compile_source(b"__global__ void f(int* x) { *x = NUMBER; }")


def test_what_nvrtc_answers_is_told_with_its_version() -> None:
    """A stand-in: the real one fails in ways that nobody can ask for."""
    nvrtc = SimpleNamespace(nvrtcResult=SimpleNamespace(NVRTC_SUCCESS="good"))

    def refuse(*_: object) -> tuple[object]:
        return (SimpleNamespace(name="NVRTC_ERROR_OUT_OF_MEMORY"),)

    refuse.__name__ = "nvrtcCreateProgram"
    nvrtc.nvrtcCreateProgram = refuse
    words = r"^NVRTC 12\.9: nvrtcCreateProgram answers NVRTC_ERROR_OUT_OF_MEMORY$"
    with pytest.raises(MachineError, match=words) as caught:
        kernels._compile(nvrtc, b"", 128, (), (12, 9))
    assert caught.value.hint == kernels.UPGRADE


def test_a_compiled_set_comes_back_from_its_bytes(code: Compiled) -> None:
    data = code.to_bytes()
    assert Compiled.of(data) == code and data.startswith(kernels.MAGIC)
    small = Compiled(b"p", b"", "r\u00e9port", (13, 1))
    assert Compiled.of(small.to_bytes()) == small
    for damaged in (data[1:], data[:-1], data + b"x", b"", kernels.MAGIC):
        assert Compiled.of(damaged) is None


def test_the_oldest_software_that_will_do_is_not_refused() -> None:
    kernels.check_device(90, "H100", kernels.OLDEST_DRIVER)
    with pytest.raises(MachineError, match=r"supports CUDA 12\.6; the kernels need 12\.7") as c:
        kernels.check_device(90, "H100", kernels.OLDEST_DRIVER - 10)
    assert "565" in c.value.hint
    oldest = SimpleNamespace(nvrtcVersion=lambda: (0, *kernels.OLDEST_NVRTC))
    assert kernels._version(oldest) == kernels.OLDEST_NVRTC
