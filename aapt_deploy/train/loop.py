"""Train: AdamW, warm-up and cosine, EMA, logs, and a state that resumes to the bit.

`fit` trains one network on a loss, `fit_together` several that share an update. Everything random
in an update comes from (seed, stage, update), so a resumed run draws what the unbroken one would
have drawn. The state is a safetensors file, replaced whole every few minutes and at the end.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from aapt_deploy.bundle.files import whole
from aapt_deploy.errors import CheckpointError, TrainingError, UsageError
from aapt_deploy.train.draws import numbers
from aapt_deploy.train.processes import ALONE, Setup, fill, own, unsharded
from aapt_deploy.train.recipe import Optimiser
from aapt_deploy.train.scalars import Events

SAVE_EVERY_S = 180.0
LOG_EVERY = 20  # updates
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, by weight

LossFunction = Callable[[torch.Generator], Tensor]
Update = Callable[
    [torch.Generator, int, float], dict[str, Tensor]
]  # rng, updates so far, scale -> figures ("loss" is one); leaves gradients
StepProgress = Callable[[int, float], None]  # update, mean loss


def learning_rate(optimiser: Optimiser, step: int) -> float:
    """Linear warm-up to the peak, then a cosine to `floor` of it."""
    if step < optimiser.warmup:
        return optimiser.learning_rate * (step + 1) / optimiser.warmup
    part = (step - optimiser.warmup) / max(1, optimiser.steps - optimiser.warmup)
    return optimiser.learning_rate * (
        optimiser.floor + (1 - optimiser.floor) * 0.5 * (1 + math.cos(math.pi * min(part, 1.0)))
    )


class Learner:
    """A network under training: its weights, their average, its optimiser.

    `name` goes before its tensors in the state.
    """

    def __init__(self, name: str, module: nn.Module, optimiser: Optimiser) -> None:
        self.prefix, self.optimiser = f"{name}." if name else "", optimiser
        self.weights: dict[str, nn.Parameter] = {
            name: p for name, p in module.named_parameters() if p.requires_grad
        }
        self.average = {name: p.detach().clone() for name, p in self.weights.items()}
        self.adam = torch.optim.AdamW(
            self.weights.values(),
            lr=0.0,
            betas=optimiser.betas,
            weight_decay=optimiser.weight_decay,
        )
        self.updates = 0  # that gave it a gradient

    def clip(self) -> float:
        """Clip the gradients. Returns their norm before that, 0 where there are none."""
        norm = nn.utils.clip_grad_norm_(self.weights.values(), self.optimiser.clip_norm)
        return float(unsharded(norm))

    def update(self, step: int) -> None:
        """Use up the gradients, if there are any."""
        if all(p.grad is None for p in self.weights.values()):
            return
        for group in self.adam.param_groups:
            group["lr"] = learning_rate(self.optimiser, step)
        self.adam.step()
        self.adam.zero_grad()
        self.updates += 1
        decay = min(self.optimiser.ema, self.updates / (self.updates + 10))
        average = [own(p) for p in self.average.values()]
        torch._foreach_lerp_(average, [own(p.detach()) for p in self.weights.values()], 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor of the state, by name."""
        kept = {f"weights.{name}": p.detach() for name, p in self.weights.items()}
        kept |= {f"average.{name}": p for name, p in self.average.items()}
        for name, p in self.weights.items():
            if p in self.adam.state:
                kept |= {f"{key}.{name}": self.adam.state[p][key] for key in MOMENTS}
        return {self.prefix + name: unsharded(tensor).contiguous() for name, tensor in kept.items()}

    def averaged(self) -> dict[str, Tensor]:
        """Return the averaged weights, unsharded."""
        return {name: unsharded(tensor) for name, tensor in self.average.items()}

    def restore(
        self,
        names: set[str],
        shape: Callable[[str], list[int]],
        read: Callable[[str], Tensor],
        updates: int,
    ) -> None:
        """Restore what `tensors` returned.

        Raises ValueError if it is another network's.
        """
        held = {name.removeprefix(self.prefix) for name in names if name.startswith(self.prefix)}
        found = {name.removeprefix("weights.") for name in held if name.startswith("weights.")}
        if found != self.weights.keys():
            wanted = sorted(self.weights)
            raise ValueError(f"its weights are {sorted(found)[:4]} …, not {wanted[:4]} …")
        for name, p in self.weights.items():
            if (wrong := tuple(shape(f"{self.prefix}weights.{name}"))) != tuple(p.shape):
                # copy_ would broadcast
                raise ValueError(f"{name} is {wrong}, not {tuple(p.shape)}")
            fill(p.data, read(f"{self.prefix}weights.{name}"))
            fill(self.average[name], read(f"{self.prefix}average.{name}"))
            if f"exp_avg.{name}" in held:
                moments = {key: torch.zeros_like(p.detach()) for key in MOMENTS}
                for key, moment in moments.items():
                    fill(moment, read(f"{self.prefix}{key}.{name}"))
                self.adam.state[p] = {"step": torch.tensor(float(updates)), **moments}
        self.updates = updates


def fit(
    module: nn.Module, loss: LossFunction, optimiser: Optimiser, state: Path, seed: int,
    progress: StepProgress, setup: Setup = ALONE,
) -> dict[str, Tensor]:  # fmt: skip
    """Train `module` on `loss` until `optimiser.steps` updates are done. Resume from `state`.

    Return the averaged (EMA) weights by name.

    Raises CheckpointError if `state` is damaged or another module's.
    Raises TrainingError if loss or gradient are not finite. `state` is then the last good one.
    """

    def update(rng: torch.Generator, step: int, scale: float) -> dict[str, Tensor]:
        value = loss(rng)
        (value * scale).backward()
        return {"loss": value}

    learner = Learner("", module, optimiser)
    fit_together([learner], update, optimiser, state, seed, progress, setup)
    return learner.averaged()


def fit_together(
    learners: list[Learner], update: Update, optimiser: Optimiser, state: Path, seed: int,
    progress: StepProgress, setup: Setup = ALONE,
) -> None:  # fmt: skip
    """Train several networks on one `update`, each of `optimiser.accumulate` batches.

    Rows of processes share the batches; FSDP2 averages their gradients. Otherwise as `fit`.
    Raises UsageError if the rows do not divide the batches.
    """
    row, rows = setup.rows
    if optimiser.accumulate % rows:
        raise UsageError(
            f"{rows} rows of processes cannot share {optimiser.accumulate} batches",
            "start as many as divide the recipe's `accumulate`",
        )
    step = _restore(state, learners) if state.exists() else 0
    log, scale = state.with_suffix(".jsonl"), rows / optimiser.accumulate
    if setup.writes:
        _forget(log, step)
    saved = started = time.monotonic()
    gathered: list[dict[str, float]] = []
    events: Events | None = None
    while step < optimiser.steps:
        batches = []
        for batch in range(row, optimiser.accumulate, rows):
            rng = numbers(seed, step, batch)
            with setup.autocast():
                made = update(rng, step, scale)
                batches.append({name: float(value.detach()) for name, value in made.items()})
        figures = setup.mean(_mean(batches))
        norms = [learner.clip() for learner in learners]
        _finite(figures | {"gradient's norm": sum(norms)}, step, state)
        for learner in learners:
            learner.update(step)
        step += 1
        gathered.append(figures)
        if step % LOG_EVERY == 0 or step == optimiser.steps:
            mean = _mean(gathered)
            rounded = {name: round(value, 5) for name, value in mean.items()}
            rate = learning_rate(optimiser, step - 1)
            line = {**rounded, "grad_norm": round(norms[0], 4), "lr": rate}
            if setup.writes:
                events = events or Events(state.with_suffix(".curves"), step)
                events.scalars(step, line | mean)
                line = {"step": step, **line, "seconds": round(time.monotonic() - started, 1)}
                with log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                progress(step, mean["loss"])
            gathered = []
        if setup.agreed(time.monotonic() - saved > SAVE_EVERY_S) or step == optimiser.steps:
            _save(state, step, learners, setup)
            saved = time.monotonic()


def _forget(log: Path, step: int) -> None:
    """Drop the lines of updates after `step`, which are done again."""
    if log.exists():
        kept = [
            line
            for line in log.read_text().splitlines(keepends=True)
            if line.endswith("\n") and json.loads(line)["step"] <= step
        ]
        with whole(log) as temporary:
            temporary.write_text("".join(kept))


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """Each figure's mean over the rows that have it."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in columns.items()}


def _finite(figures: Mapping[str, float], step: int, state: Path) -> None:
    for name, value in figures.items():
        if not math.isfinite(value):
            raise TrainingError(
                f"the {name} of update {step + 1} is {value} ({state.stem})",
                "the last saved state is kept: lower the learning rate in the recipe, or look for "
                "broken clips, then run the command again",
            )


def _save(path: Path, step: int, learners: list[Learner], setup: Setup) -> None:
    tensors: dict[str, Tensor] = {}
    for learner in learners:
        tensors |= learner.tensors()
    if not setup.writes:
        return
    updates = " ".join(str(learner.updates) for learner in learners)
    with whole(path) as temporary:
        save_file(tensors, temporary, metadata={"step": str(step), "updates": updates})


def _restore(path: Path, learners: list[Learner]) -> int:
    try:
        with safe_open(path, framework="pt") as file:
            step = int(file.metadata()["step"])
            updates = [int(count) for count in file.metadata().get("updates", str(step)).split()]
            names = set(file.keys())
            for learner, count in zip(learners, updates, strict=True):
                learner.restore(
                    names, lambda name: file.get_slice(name).get_shape(), file.get_tensor, count
                )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"training state {path} cannot be resumed: {error}",
            "delete it to start the stage again",
        ) from None
    return step
