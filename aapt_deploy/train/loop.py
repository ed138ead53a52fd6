"""The only training loop: AdamW, warm-up and cosine, EMA, a plottable log, and a state that a killed run resumes from to the bit.

Everything random in an update comes from (seed, stage, update), so a resumed run draws what the unbroken one would have drawn. The state is
a safetensors file written beside its final name and renamed, every few minutes and at the end.
"""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from aapt_deploy.errors import CheckpointError, TrainingError
from aapt_deploy.train.recipe import Optimiser

SAVE_EVERY_S = 180.0
LOG_EVERY = 20  # updates

Loss = Callable[[torch.Generator], Tensor]
Progress = Callable[[int, float], None]  # update, mean loss


def learning_rate(optimiser: Optimiser, step: int) -> float:
    """Linear warm-up to the peak, then a cosine to a hundredth of it."""
    if step < optimiser.warmup:
        return optimiser.learning_rate * (step + 1) / optimiser.warmup
    part = (step - optimiser.warmup) / max(1, optimiser.steps - optimiser.warmup)
    return optimiser.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(part, 1.0))))


def fit(module: nn.Module, loss: Loss, optimiser: Optimiser, state: Path, seed: int, progress: Progress) -> dict[str, Tensor]:
    """Train `module` on `loss` until `optimiser.steps` updates are done, resuming from `state` if it exists.

    Returns the averaged (EMA) weights by name. Raises CheckpointError when `state` is damaged or belongs to another module, and TrainingError
    when the loss is no longer finite; the state on disk then is the last good one.
    """
    weights: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    average = {name: p.detach().clone() for name, p in weights.items()}
    adam = torch.optim.AdamW(weights.values(), lr=0.0, betas=optimiser.betas, weight_decay=optimiser.weight_decay)
    step = _restore(state, weights, average, adam) if state.exists() else 0
    log = state.with_suffix(".jsonl")
    saved, started, losses = time.monotonic(), time.monotonic(), []
    while step < optimiser.steps:
        for group in adam.param_groups:
            group["lr"] = learning_rate(optimiser, step)
        rng = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(rng)
        if not value.isfinite():
            raise TrainingError(
                f"the loss of update {step + 1} is {value.item()} ({state.stem})",
                "the last saved state is kept: lower the learning rate in the recipe, or look for broken clips, then run the command again",
            )
        value.backward()
        norm = nn.utils.clip_grad_norm_(weights.values(), optimiser.clip_norm)
        adam.step()
        adam.zero_grad()
        step += 1
        decay = min(optimiser.ema, step / (step + 10))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in weights.values()], 1 - decay)
        losses.append(value.item())
        if step % LOG_EVERY == 0 or step == optimiser.steps:
            mean = sum(losses) / len(losses)
            line = {"step": step, "loss": round(mean, 5), "grad_norm": round(float(norm), 4), "lr": learning_rate(optimiser, step - 1)}
            with log.open("a") as file:
                file.write(json.dumps({**line, "seconds": round(time.monotonic() - started, 1)}) + "\n")
            progress(step, mean)
            losses = []
        if time.monotonic() - saved > SAVE_EVERY_S or step == optimiser.steps:
            _save(state, step, weights, average, adam)
            saved = time.monotonic()
    return average


def _save(path: Path, step: int, weights: dict[str, Tensor], average: dict[str, Tensor], adam: torch.optim.AdamW) -> None:
    tensors = {f"weights.{name}": p.detach() for name, p in weights.items()} | {f"average.{name}": p for name, p in average.items()}
    for name, p in weights.items():
        if p in adam.state:
            tensors |= {f"{key}.{name}": adam.state[p][key] for key in ("exp_avg", "exp_avg_sq")}
    temporary = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"step": str(step)})
    os.replace(temporary, path)


def _restore(path: Path, weights: dict[str, Tensor], average: dict[str, Tensor], adam: torch.optim.AdamW) -> int:
    try:
        with safe_open(path, framework="pt") as file:
            step = int(file.metadata()["step"])
            held = set(file.keys())
            if (found := {key.removeprefix("weights.") for key in held if key.startswith("weights.")}) != weights.keys():
                raise ValueError(f"its weights are {sorted(found)[:4]} …, not {sorted(weights)[:4]} …")
            for name, p in weights.items():
                if (shape := tuple(file.get_slice(f"weights.{name}").get_shape())) != tuple(p.shape):
                    raise ValueError(f"{name} is {shape}, not {tuple(p.shape)}")  # copy_ would broadcast
                p.data.copy_(file.get_tensor(f"weights.{name}"))
                average[name].copy_(file.get_tensor(f"average.{name}"))
                if f"exp_avg.{name}" in held:
                    moments = {key: file.get_tensor(f"{key}.{name}") for key in ("exp_avg", "exp_avg_sq")}
                    adam.state[p] = {"step": torch.tensor(float(step)), **moments}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"training state {path} cannot be resumed: {error}", "delete it to start the stage again") from None
    return step
