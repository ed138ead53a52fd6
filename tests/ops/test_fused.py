"""The fused operations: plain form against PyTorch's own, Triton's against the plain one.

And Triton's compiles for Hopper.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from aapt_deploy.models.aapt.layers import EPS, rms_norm, rotate
from aapt_deploy.ops import fused, fused_triton
from aapt_deploy.profiles import load
from tests.support import ROOT


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_the_plain_form_is_the_models_own_arithmetic() -> None:
    x, y, (shift, scale, gate) = draw(5, 96), draw(6, 96)[:5], draw(3, 96)
    kept, out = fused.gated(x, y, gate, shift, scale, EPS, None)
    assert torch.allclose(kept, x + (1 + gate) * y, atol=1e-6)
    assert torch.allclose(out, rms_norm(kept) * (1 + scale) + shift, atol=1e-5)
    assert torch.equal(out, fused.modulated(kept, shift, scale, EPS, None))
    qkv, (norm_q, norm_k) = draw(5, 3 * 2 * 16), draw(2, 16)
    angle = draw(5, 8)
    rope = torch.stack([angle.cos(), angle.sin()])
    q, k, v = qkv.view(1, 5, 3, 2, 16).unbind(2)
    found = fused.heads(qkv, norm_q, norm_k, rope, EPS)
    for given, weight, made in ((q, norm_q, found[0]), (k, norm_k, found[1])):
        assert torch.allclose(made, rotate(rms_norm(given) * weight, rope[None]), atol=1e-5)
    assert torch.equal(found[2], v) and all(x.is_contiguous() for x in found)
    assert torch.allclose(fused.activated(x, None), F.gelu(x, approximate="tanh"), atol=1e-6)


def test_codes_saturate_and_a_product_undoes_its_scales() -> None:
    step = torch.tensor([0.01])
    codes = fused.quantised(torch.tensor([1e9, -1e9, 0.0, 0.011]), step)
    assert codes.float().tolist() == [448, -448, 0, pytest.approx(1.125)]
    x, weight, bias = draw(7, 64), draw(48, 64), draw(48)
    steps = weight.abs().amax(1) / fused.E4M3_MAX
    narrow = [
        fused.quantised(x, x.abs().max() / fused.E4M3_MAX),
        fused.quantised(weight, steps[:, None]),
    ]
    exact = x @ weight.T + bias
    for x_scale, weight_scale in (((x.abs().max() / fused.E4M3_MAX).expand(7, 1), steps[None]),):
        error = (
            fused.product(*narrow, x_scale, weight_scale, bias, torch.float32) - exact
        ).norm() / exact.norm()
        assert 1e-3 < error < 0.05


@pytest.mark.parametrize("name", ["aapt-8b-736x416-h100", "aapt-8b-1280x720-h100", "demo-cpu"])
@pytest.mark.parametrize("by_row", [True, False])
def test_pytorchs_fp8_product_takes_what_the_step_gives_it(
    name: str, by_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`torch._scaled_mm` checks shapes, strides and multiples of 16, on fake tensors of a GPU."""
    monkeypatch.setattr(torch._meta_registrations, "device_hint", lambda tensor: "cuda")
    from types import SimpleNamespace

    from aapt_deploy.backends.torch_cuda import kernels as torch_kernels
    from aapt_deploy.backends.torch_cuda.step import Narrow
    from aapt_deploy.ops import fused_triton

    profile = load(name)
    dim, hidden = profile.model.dim, profile.model.dim * profile.model.mlp_ratio
    kernels = torch_kernels.Kernels(
        **vars(torch_kernels.plain()) | {"product": fused_triton.product}
    )
    with torch.device("meta"):
        for inputs, outputs, bias in (
            (dim, 3 * dim, False),
            (dim, dim, True),
            (dim, hidden, True),
            (hidden, dim, True),
        ):
            wide = torch.bfloat16
            layer = SimpleNamespace(
                weight=torch.empty(outputs, inputs, dtype=wide),
                bias=torch.empty(outputs, dtype=wide) if bias else None,
            )
            narrow = Narrow(
                layer,
                torch.empty(1),
                torch.empty(outputs),
                profile.frame_tokens,
                kernels,
                torch.bfloat16,
                by_row,
            )
            y = narrow(torch.empty(profile.frame_tokens, inputs, dtype=fused.FP8))
            assert y.shape == (profile.frame_tokens, outputs) and y.dtype == torch.bfloat16
            assert narrow.bias is None or narrow.bias.dtype == torch.bfloat16
            assert narrow.x_scale.numel() == (profile.frame_tokens if by_row else 1)


@pytest.mark.parametrize("bias", [None, torch.zeros(4)])
def test_the_product_on_a_gpu_gives_pytorch_everything(
    monkeypatch: pytest.MonkeyPatch, bias: torch.Tensor | None
) -> None:
    """The weight transposed, both scales, the bias, the type, the fast accumulator."""
    seen: list[tuple[tuple[torch.Tensor, ...], dict[str, object]]] = []
    monkeypatch.setattr(torch, "_scaled_mm", lambda *x, **named: seen.append((x, named)) or "y")  # type: ignore[func-returns-value]
    x, weight, of_x, of_weight = draw(3, 5), draw(4, 5), draw(3, 1), draw(1, 4)
    assert fused_triton.product(x, weight, of_x, of_weight, bias, torch.bfloat16) == "y"
    (((a, b), named),) = seen
    assert a is x and b.shape == (5, 4) and b.data_ptr() == weight.data_ptr()
    assert named.pop("scale_a") is of_x and named.pop("scale_b") is of_weight
    assert named.pop("bias") is bias
    assert named == {"out_dtype": torch.bfloat16, "use_fast_accum": True}


Launch = tuple[tuple[int, ...], tuple[object, ...], dict[str, object]]


class Launched:
    """In the place of a kernel: keeps its grid and what it is given."""

    def __init__(self, launches: list[Launch]) -> None:
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *given, **named: self.launches.append((grid, given, named))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    made: list[Launch] = []
    for name in ("_modulate", "_heads", "_pointwise"):
        monkeypatch.setattr(fused_triton, name, Launched(made))
    return made


def test_one_program_takes_a_row_or_a_run_of_elements(launches: list[Launch]) -> None:
    """In 8 warps for a row, whose length is rounded up; the interpreter knows neither."""
    x, row, norm, step = draw(5, 3000), draw(3000), draw(24), torch.ones(1)
    fused_triton.modulated(x, row, row, EPS, None)
    fused_triton.gated(x, x, row, row, row, EPS, step)
    fused_triton.heads(draw(5, 3 * 6 * 24), norm, norm, draw(2, 5, 12), EPS)
    fused_triton.activated(x, step)
    assert [grid for grid, *_ in launches] == [(5,), (5,), (5,), (8,)]
    assert [named for *_, named in launches] == [
        {"RESIDUAL": False, "QUANTISED": False, "BLOCK": 4096, "num_warps": 8},
        {"RESIDUAL": True, "QUANTISED": True, "BLOCK": 4096, "num_warps": 8},
        {"H": 6, "P": 12, "HEADS": 8, "PAIRS": 16, "num_warps": 8},
        {"GELU_C": fused_triton.GELU_2C, "GELU": True, "QUANTISED": True,
         "BLOCK": fused_triton.ELEMENTS},
    ]  # fmt: skip
    x = draw(3, 2048)
    fused_triton.quantised(x, step)
    grid, (given, scale, out, count), named = launches[-1]
    assert grid == (3,) and given is x and scale is step and count == 3 * 2048
    assert isinstance(out, torch.Tensor) and (out.shape, out.dtype) == (x.shape, fused.FP8)
    assert not named["GELU"] and named["QUANTISED"]


def test_rows_with_gaps_or_of_another_type_are_refused(launches: list[Launch]) -> None:
    x, row, norm = draw(5, 64), draw(64), draw(16)
    gaps, wide = draw(5, 128)[:, ::2], draw(128)[::2]
    qkv, rope = draw(5, 3 * 2 * 16), draw(2, 5, 8)
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: fused_triton.quantised(gaps, row), r"x\.stride\(\)=\(128, 2\)"),
        (lambda: fused_triton.modulated(gaps, row, row, EPS, None), r"x\.stride"),
        (lambda: fused_triton.gated(x, gaps, row, row, row, EPS, None), r"x\.stride"),
        (lambda: fused_triton.gated(gaps, x, row, row, row, EPS, None), r"x\.stride"),
        (lambda: fused_triton.heads(draw(5, 192)[:, ::2], norm, norm, rope, EPS), "qkv.stride"),
        (lambda: fused_triton.heads(qkv, norm, norm, draw(2, 5, 16)[..., ::2], EPS), "rope.stride"),
        (lambda: fused_triton.heads(qkv, norm, norm, draw(2, 4, 8), EPS), "rope.shape"),
        (lambda: fused_triton.heads(qkv, norm, norm, draw(2, 5, 16), EPS), "rope.shape"),
    ]
    for place in range(3):
        for bad in (wide, row.half()):
            rows = [row] * 3
            rows[place] = bad
            call = lambda rows=rows: fused_triton.gated(x, x, *rows, EPS, None)
            refused.append((call, r"row\.stride\(\)=\((1|2),\) row\.dtype=torch\.float"))
    for call, words in refused:
        with pytest.raises(AssertionError, match=words):
            call()
    assert launches == []


INTERPRETED = """
import torch
from aapt_deploy.ops import fused
from aapt_deploy.ops import fused_triton
rng = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(*shape, generator=rng)
step, eps = torch.tensor([0.02]), 1e-5
# The interpreter rounds to e4m3 in its own way: test everything before the rounding.
fused_triton.FP8 = torch.float32
clamped = lambda x, s: (x.float() / s).clamp(-448, 448)
fused.quantised = clamped
def close(made, wanted):
    rtol = 2e-3 if made.dtype == torch.float16 else 1e-4
    same = made.dtype == wanted.dtype and torch.allclose(made, wanted, rtol=rtol, atol=1e-4)
    assert same, (made - wanted).abs().max()
for dtype in (torch.float32, torch.float16):
    for dim in (64, 96):
        x, y, shift, scale, gate = (draw(*shape) for shape in ((5, dim), (5, dim), *[(dim,)] * 3))
        x, y = x.to(dtype), y.to(dtype)
        for s in (None, step):
            rest = shift, scale, eps, s
            close(fused_triton.modulated(x, *rest), fused.modulated(x, *rest))
            pairs = zip(fused_triton.gated(x, y, gate, *rest), fused.gated(x, y, gate, *rest))
            for made, wanted in pairs:
                close(made, wanted)
            close(fused_triton.activated(3 * x, s), fused.activated(3 * x, s))
        close(fused_triton.quantised(30 * x, step), clamped(30 * x, step))
        assert clamped(30 * x, step).abs().max() == 448
    for heads, half in ((2, 32), (3, 12)):
        angle = draw(5, half)
        qkv, norms = draw(5, 3 * heads * 2 * half).to(dtype), (draw(2 * half), draw(2 * half))
        given = qkv, *norms, torch.stack([angle.cos(), angle.sin()]), eps
        for made, wanted in zip(fused_triton.heads(*given), fused.heads(*given)):
            assert made.shape == wanted.shape
            close(made, wanted)
print("done")
"""

COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from aapt_deploy.ops import fused_triton as f
from tests.support.triton_code import check_accesses
names = ("gate", "shift", "scale", "step", "norm_q", "norm_k", "rope")
floats = dict.fromkeys(names, "*fp32") | {"eps": "fp32"}
numbers = dict.fromkeys(("dim", "N", "count"), "i32")
constant = lambda names: dict.fromkeys(names, "constexpr")
cases = []
for quantised in (True, False):
    out = {"out": "*fp8e4nv" if quantised else "*bf16"}
    wide = dict.fromkeys(("x", "y", "kept"), "*bf16") | out
    for flag in (True, False):
        modulate = {"RESIDUAL": flag, "QUANTISED": quantised, "BLOCK": 4096}
        pointwise = {"GELU_C": f.GELU_2C, "GELU": flag, "QUANTISED": quantised, "BLOCK": f.ELEMENTS}
        cases += [
            (f._modulate, wide, modulate, 8, (3 + 2 * flag + quantised, 1 + flag)),
            (f._pointwise, wide, pointwise, 4, (1 + quantised, 1)),
        ]
for heads, half in ((24, 64), (4, 32)):
    numbers_of = {"H": heads, "P": half, "HEADS": 32 if heads == 24 else 4, "PAIRS": half}
    own = dict.fromkeys(("qkv", "q", "k", "v"), "*bf16")
    # cos and sin; two halves and two norms of q and of k; two halves of v
    cases.append((f._heads, own, numbers_of, 8, (2 + 2 * 4 + 2, 3 * 2)))
for kernel, own, constants, warps, accesses in cases:
    kinds = floats | numbers | own | constant(constants)
    signature = {name: kinds[name] for name in kernel.arg_names}
    hopper, options = GPUTarget("cuda", 90, 32), {"num_warps": warps}
    made = compile(ASTSource(kernel, signature, constants), target=hopper, options=options)
    assert "sm_90" in made.asm["ptx"] and made.asm["cubin"]
    check_accesses(made.asm["ttir"], *accesses)
    if constants.get("QUANTISED"):
        assert "cvt.rn.satfinite.e4m3x2" in made.asm["ptx"]
print("done")
"""


@pytest.mark.parametrize(
    ("code", "variables"),
    [(INTERPRETED, {"TRITON_INTERPRET": "1"}), (COMPILED, {})],
    ids=["interpreted", "compiled"],
)
def test_triton_in_a_process_of_its_own(
    code: str, variables: dict[str, str], tmp_path: Path
) -> None:
    environment = (
        os.environ
        | variables
        | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr
