"""What headline.py expects before it measures, and what must hold.

A stage is expected to take its work over an assumed rate; the rates were assumed before any GPU had
run it. Work comes from `aapt_deploy.models.cost`; rates are the data sheet's times an efficiency. A
wrong prediction says where to look.
"""

import functools
from typing import Any

from aapt_deploy.models.cost import GPUS, Cost, cost_of
from aapt_deploy.profiles import Profile, load

GPU = GPUS["H100"]  # an H200 has the same compute, and 4.8 instead of 3.35 TB/s
EFFICIENCY = {
    "fp8 products": 0.60, "bf16 products": 0.70, "attention fp8": 0.33, "attention bf16": 0.62,
    "attention of PyTorch": 0.37, "decoder": 0.35, "bandwidth": 0.70,
}  # fmt: skip
ONE_SCALE = 1.15  # products with one scale for all rows, over those by row
FUSED_BYTES = 47  # moved by a layer's small operations, per number of the stream [F, dim]
UNFUSED = 3.2  # times as many
LAUNCH_MS = {
    "captured": 0.0012,
    "launched": 0.006,
}  # gap before each kernel; launched ones come from Python
KERNELS = {"fused": 14, "unfused": 48}  # of a layer
PINNED_GB_S = 22.0
LEAST_FPS, FLAT, PARITY_DB = 24.0, 0.05, 40.0
PART_OF_MODEL = 0.8  # of what the model predicts, a goal asks for this much
RIVAL = "plain PyTorch"  # bf16, SDPA over a KV cache, small operations unfused, launched one by one
WIDE = "aapt-8b-736x416-h100"


planned = functools.cache(cost_of)


def predicted(profile: Profile, precision: str, variant: str = "as it is") -> dict[str, float]:
    """Milliseconds of generator, decoder, hand-off and an overlapped step.

    And of the generator's parts.
    """
    stages = {stage.name: stage for stage in planned(profile).stages}
    work, wide = stages["generator"], precision == "bf16" or variant in ("bf16", RIVAL)
    kind = "bf16" if wide else "fp8"
    rate = GPU.flops["bf16" if wide else "fp8_e4m3"]
    numbers = profile.frame_tokens * profile.model.dim * profile.model.depth
    fused = "unfused" if variant in ("small operations unfused", RIVAL) else "fused"
    launch = "launched" if variant in ("no captured graph", RIVAL) else "captured"
    attention = "attention of PyTorch" if variant == RIVAL else f"attention {kind}"
    parts = {
        "products": work.products_gflop
        * 1e12
        / (rate * EFFICIENCY[f"{kind} products"])
        / (ONE_SCALE if "one FP8" in variant else 1),
        "attention": work.attention_gflop * 1e12 / (rate * EFFICIENCY[attention]),
        "small operations": 1000
        * FUSED_BYTES
        * numbers
        / (GPU.bandwidth * EFFICIENCY["bandwidth"])
        * (UNFUSED if fused == "unfused" else 1),
        "gaps": KERNELS[fused] * profile.model.depth * LAUNCH_MS[launch],
    }
    generator, decoder = (
        sum(parts.values()),
        stages["decoder"].products_gflop * 1e12 / (GPU.flops["bf16"] * EFFICIENCY["decoder"]),
    )
    video = profile.video
    hand_off = video.temporal_stride * video.height * video.width * 3 / (PINNED_GB_S * 1e6)
    # Side by side they share the multiprocessors: the sum of their work, less a fifth of the
    # shorter one, which fills the other's gaps.
    step = generator + decoder - 0.2 * min(generator, decoder) + hand_off
    whole = {
        "generator": generator,
        "decoder": decoder,
        "hand-off": hand_off,
        "overlapped step": step,
        "fps": 1000 * video.temporal_stride / step,
    }
    return {
        name: round(value, 3)
        for name, value in (
            whole | {f"generator: {name}": ms for name, ms in parts.items()}
        ).items()
    }


@functools.cache
def goal_fps() -> float:
    """Frames a second at 736x416 end to end: what the model predicts, with room to be wrong."""
    return round(PART_OF_MODEL * predicted(load(WIDE), "fp8")["fps"])


@functools.cache
def goal_ratio() -> float:
    """A generator pass of plain PyTorch over ours, by the model."""
    ours, theirs = (predicted(load(WIDE), "fp8", name)["generator"] for name in ("", RIVAL))
    return round(PART_OF_MODEL * theirs / ours, 1)


def share_of_floor(of: Cost, measured_ms: dict[str, float]) -> dict[str, dict[str, Any]]:
    """TFLOP/s that a stage attained, and its floor over its time.

    No floor where the target's rates are not known.
    """
    found = {}
    for stage in of.stages:
        if stage.name in measured_ms:
            ms = measured_ms[stage.name]
            tflops = (stage.products_gflop + stage.attention_gflop) / ms
            found[stage.name] = {
                "tflops": round(tflops, 2),
                "floor_ms": stage.floor_ms,
                "share": stage.floor_ms and round(stage.floor_ms / ms, 3),
            }
    return found


def goals(record: dict[str, Any]) -> dict[str, bool]:
    """What must hold, of the stages that gave a result."""
    found: dict[str, bool] = {}
    wide_, rivals_, parity_ = (record.get(name, {}) for name in ("wide", "rivals", "parity"))
    if "overlapped" in wide_:
        o = wide_["overlapped"]
        found[f"at least {LEAST_FPS:.0f} fps end to end at 736x416"] = o["fps"] >= LEAST_FPS
        found[f"goal: {goal_fps():.0f} fps"] = o["fps"] >= goal_fps()
        found["flat over all steps that were asked for"] = (
            o["steps"] == o["asked"] and abs(o["last_tenth_over_first"] - 1) <= FLAT
        )
        found["nothing allocated after warm-up"] = o["allocated_bytes_more"] == 0
        times = [
            entry["ms"]["p50"]
            for entry in rivals_.values()
            if isinstance(entry, dict) and "ms" in entry
        ]
        if times and "stages" in wide_:
            name = f"{goal_ratio()} times the fastest plain PyTorch, by generator pass"
            found[name] = min(times) >= goal_ratio() * wide_["stages"]["generator"]["p50"]
    if "captured" in parity_:
        found[f"at least {PARITY_DB:.0f} dB against float32 on the CPU"] = (
            min(parity_["psnr_db_by_block"]) >= PARITY_DB
        )
        found["a captured pass is the launched one"] = parity_["captured"]
    return found
