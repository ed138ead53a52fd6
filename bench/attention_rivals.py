"""Time a call on a GPU, with clocks and power, and the attention kernels of others.

bench/attention.py times its own kernel beside them. None of them is a dependency: what is not
installed or refuses the shape is reported and left out.
"""

import statistics
import sys
import threading
import time
from collections.abc import Callable

import torch
from stages import HOW

from aapt_deploy.ops.block_causal_attention import softmax_scale
from tests.support.attention_checks import Case


def timed(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds per call, in batches of about 50 ms, for `seconds` after a warm-up."""
    if HOW.small:
        start = time.perf_counter()
        call()
        return [time.perf_counter() - start]
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    batch = max(1, min(200, int(0.05 / max(1e-6, time.perf_counter() - start))))
    samples, spent = [], 0.0
    while spent < seconds:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(batch):
            call()
        last.record()
        last.synchronize()
        elapsed = first.elapsed_time(last) / 1000
        spent += elapsed
        samples.append(elapsed / batch)
    return samples


class Meter:
    """SM clock (MHz), power (W) and temperature (C), twenty times a second while it is entered.

    Needs nvidia-ml-py; without it there are none.
    """

    told = False  # that there are none

    def __init__(self) -> None:
        self.samples: list[tuple[int, float, int]] = []
        self.stop = threading.Event()
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(0).uuid)
            self.nvml, self.handle = (
                pynvml,
                pynvml.nvmlDeviceGetHandleByUUID(
                    uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
                ),
            )
        except Exception as error:
            self.nvml = None
            if not HOW.small and not Meter.told:
                print(f"no clocks and power: {error}", file=sys.stderr)
                Meter.told = True

    def watch(self) -> None:
        while not self.stop.wait(0.05):
            self.samples.append(
                (
                    self.nvml.nvmlDeviceGetClockInfo(self.handle, self.nvml.NVML_CLOCK_SM),
                    self.nvml.nvmlDeviceGetPowerUsage(self.handle) / 1000,
                    self.nvml.nvmlDeviceGetTemperature(self.handle, self.nvml.NVML_TEMPERATURE_GPU),
                )
            )

    def __enter__(self) -> "Meter":
        self.thread = threading.Thread(target=self.watch, daemon=True)
        if self.nvml:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        if self.nvml:
            self.thread.join()

    def summary(self) -> dict[str, float]:
        late = self.samples[len(self.samples) // 4 :]  # without the ramp
        if not late:
            return {}
        clock, watts, celsius = (statistics.median(column) for column in zip(*late, strict=True))
        return {
            "sm_mhz": clock,
            "sm_mhz_min": min(c for c, _, _ in late),
            "watts": round(watts, 1),
            "celsius": celsius,
        }


def rivals(drawn: Callable[[], Case]) -> dict[str, Callable[[], Callable[[], object]]]:
    """Other kernels on the same numbers. Each maker prepares what is not timed; it may fail."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def inputs_of() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """q [T, H, D], k and v [S + T, H, D] in bf16, and S."""
        case = drawn()
        return case.q, case.k, case.v, case.cached

    def heads_first() -> list[torch.Tensor]:  # [1, H, n, D]
        return [x.transpose(0, 1)[None].contiguous() for x in inputs_of()[:3]]

    scale = softmax_scale(128)
    fp8 = lambda x: x.to(torch.float8_e4m3fn)

    def sdpa(backend: SDPBackend) -> Callable[[], object]:
        inputs = heads_first()

        def call() -> object:
            with sdpa_kernel([backend]):
                return torch.nn.functional.scaled_dot_product_attention(*inputs, scale=scale)

        return call

    def ours_bf16() -> Callable[[], object]:
        from aapt_deploy.ops.block_causal_attention import torch_op

        if not HOW.small:
            from aapt_deploy.ops.block_causal_attention import triton_op  # noqa: F401
        q, k, v, cached = inputs_of()
        own, past = (
            [x[None, cached:].contiguous() for x in (k, v)],
            [x[None, :cached].contiguous() for x in (k, v)],
        )
        length = torch.tensor([cached], dtype=torch.int32, device=q.device)
        return lambda: torch_op.operator(q[None], *own, *past, length)

    def flash3(convert: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        import flash_attn_interface

        inputs = [convert(x)[None].contiguous() for x in inputs_of()[:3]]
        return lambda: flash_attn_interface.flash_attn_func(*inputs, softmax_scale=scale)

    def sage() -> Callable[[], object]:
        import sageattention

        inputs = heads_first()
        return lambda: sageattention.sageattn_qk_int8_pv_fp8_cuda_sm90(
            *inputs, tensor_layout="HND", sm_scale=scale
        )

    def cudnn_fp8() -> Callable[[], object]:
        import cudnn

        inputs = [fp8(x) for x in heads_first()]
        handle, single, narrow = (
            cudnn.create_handle(),
            cudnn.data_type.FLOAT,
            cudnn.data_type.FP8_E4M3,
        )
        graph = cudnn.pygraph(
            io_data_type=narrow,
            intermediate_data_type=single,
            compute_data_type=single,
            handle=handle,
        )
        nodes = [graph.tensor_like(x).set_data_type(narrow) for x in inputs]
        one = torch.ones(1, 1, 1, 1, device="cuda")
        scales = [
            graph.tensor(dim=[1, 1, 1, 1], stride=[1, 1, 1, 1], data_type=single) for _ in range(6)
        ]
        out, _, amax_s, amax_o = graph.sdpa_fp8(
            q=nodes[0], k=nodes[1], v=nodes[2], descale_q=scales[0], descale_k=scales[1],
            descale_v=scales[2], descale_s=scales[3], scale_s=scales[4], scale_o=scales[5],
            is_inference=True, attn_scale=scale, use_causal_mask=False, name="sdpa",
        )  # fmt: skip
        made = torch.empty_like(inputs[0])
        out.set_output(True).set_dim(list(made.shape)).set_stride(
            list(made.stride())
        ).set_data_type(narrow)
        for amax in (amax_s, amax_o):
            amax.set_output(True).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1]).set_data_type(
                single
            )
        graph.build([cudnn.heur_mode.A])
        workspace = torch.empty(
            max(1, graph.get_workspace_size()), dtype=torch.uint8, device="cuda"
        )
        pack = {
            **dict(zip(nodes, inputs, strict=True)),
            **dict.fromkeys(scales, one),
            out: made,
            amax_s: one.clone(),
            amax_o: one.clone(),
        }
        return lambda: graph.execute(pack, workspace, handle=handle)

    return {
        "PyTorch flash bf16": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
        "PyTorch cuDNN bf16": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
        "Triton bf16 (ours)": ours_bf16, "FlashAttention-3 bf16": lambda: flash3(lambda x: x),
        "FlashAttention-3 FP8": lambda: flash3(fp8),
        "SageAttention INT8 + FP8": sage, "cuDNN FP8": cudnn_fp8,
    }  # fmt: skip
