"""Train the generator's stages in their order.

Each stage writes one file into the run's folder and is skipped if it is there.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aapt_deploy.backends.trial import Report
from aapt_deploy.bundle.files import whole
from aapt_deploy.errors import CheckpointError, InputError
from aapt_deploy.models import checkpoint
from aapt_deploy.models.aapt.discriminator import Discriminator
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.train.draws import coin, numbers
from aapt_deploy.train.loop import Learner, fit, fit_together
from aapt_deploy.train.losses.adversarial import adversarial_update
from aapt_deploy.train.losses.anchor import fit_anchor
from aapt_deploy.train.losses.anchored import anchored_loss, level_errors, own_flights
from aapt_deploy.train.losses.consistency import consistency_loss
from aapt_deploy.train.losses.flow import Latents, flow_loss
from aapt_deploy.train.losses.student_forcing import forced_flow_loss
from aapt_deploy.train.losses.trajectory import measure_fade, trajectory_loss
from aapt_deploy.train.processes import ALONE, Setup, unsharded
from aapt_deploy.train.recipe import (
    AdversarialStage,
    AnchoredStage,
    ConsistencyStage,
    FlowStage,
    Optimiser,
    Recipe,
    TrajectoryStage,
)

Timesteps = tuple[float, ...] | None  # of a sampler; None: the profile's

ONE_STEP = (1.0,)
SEEDS = {  # no two stages draw the same numbers
    "generator": 0,
    "consistency": 1000,
    "adversarial": 2000,
    "trajectory": 3000,
    "anchored": 4000,
}


def part(
    path: Path,
    module: nn.Module,
    make: Callable[[], None],
    setup: Setup = ALONE,
    together: bool = True,
) -> None:
    """Run `make`, which trains `module`, unless the file `path` already has its result.

    Every process runs `make`. Without `together` the first one does, and the others load its file.
    Raises CheckpointError if the file is damaged.
    """
    done = path.exists()
    setup.wait()  # all processes look before one writes
    if not done and (together or setup.writes):
        make()
        if setup.writes:
            save_part(path, module)
    setup.wait()
    if done or not (together or setup.writes):
        load_part(path, module)


def load_part(path: Path, module: nn.Module) -> None:
    try:
        module.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"part {path} of an earlier run cannot be used: {error}",
            "delete it to train this part again",
        ) from None


def save_part(path: Path, module: nn.Module) -> None:
    save_tensors(path, module.state_dict())


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with whole(path) as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary)


def generator_loss(
    generator: Generator, latents: Latents, stage: FlowStage, rng: torch.Generator
) -> Tensor:
    """Return one batch's flow loss, a scalar.

    It is along the generator's own rollout in a share `stage.forced` of the batches, and under
    teacher forcing in the others.
    """
    loss = forced_flow_loss if coin(rng, 0) < stage.forced else flow_loss
    batch = latents.draw(generator.profile, stage, rng).to(generator.step_spread.device)
    return loss(generator, batch, stage, rng)


@dataclass(frozen=True)
class GeneratorStages:
    """The stages of one run. They train `generator` in place."""

    generator: Generator
    latents: Latents
    recipe: Recipe
    folder: Path  # of the run
    report: Report
    setup: Setup

    def all(self, adapted: bool, distilled: Path | None) -> Iterator[tuple[str, Timesteps]]:
        """Run the stages. Yield the name and sampler's times of each that is done.

        adapted: the generator comes from flow matching.
        distilled: a checkpoint that replaces distillation.
        """
        recipe = self.recipe
        self.generator.checkpointing = self.setup.checkpointing
        if not adapted:
            for number, stage in enumerate(recipe.flow, start=1):
                self._part("generator", number, partial(self._flow, number, stage))
        yield "adapted", None
        teacher = copy.deepcopy(self.generator)
        if distilled is not None:
            self._take(distilled)
            yield "distilled", ONE_STEP
        else:
            for number, distillation in enumerate(recipe.consistency, start=1):
                make = partial(self._distil, number, distillation, teacher)
                yield self._part("consistency", number, make), ONE_STEP
            for number, regression in enumerate(recipe.trajectory, start=1):
                make = partial(self._regress, number, regression, teacher)
                yield self._part("trajectory", number, make), ONE_STEP
        for number, game in enumerate(recipe.adversarial, start=1):
            make = partial(self._play, number, game, teacher)
            yield self._part("adversarial", number, make), game.timesteps
        before = copy.deepcopy(self.generator)
        for number, anchored in enumerate(recipe.anchored, start=1):
            make = partial(self._anchor, number, anchored, before)
            yield self._part("anchored", number, make), ONE_STEP

    def _part(self, kind: str, number: int, make: Callable[[], None]) -> str:
        """Run a stage unless it is done. Return its name."""
        name = f"{kind}-{number}"
        part(self.folder / f"{name}.safetensors", self.generator, make, self.setup)
        return name

    def _take(self, path: Path) -> None:
        """Load another checkpoint's weights. Raises InputError if its shape differs."""
        loaded, profile = checkpoint.load(path), self.generator.profile
        if loaded.profile.replace(sampler=profile.sampler, name=profile.name) != profile:
            raise InputError(
                f"checkpoint {path} has another profile than the run",
                "give checkpoints of one model; their samplers may differ",
            )
        self.generator.load_state_dict(loaded.generator.state_dict())

    def _progress(self, name: str, optimiser: Optimiser) -> Callable[[int, float], None]:
        def progress(step: int, loss: float) -> None:
            self.report(f"{name}: {step} of {optimiser.steps} updates, loss {loss:.4f}")

        return progress

    def _sharded(self) -> Generator:
        """Return the generator to train: itself if alone, else a sharded copy."""
        if self.setup.mesh is None:
            return self.generator
        return self.setup.shared(copy.deepcopy(self.generator))

    def _seed(self, kind: str, number: int) -> int:
        return self.recipe.seed + SEEDS[kind] + number

    def _fit(
        self,
        kind: str,
        number: int,
        optimiser: Optimiser,
        loss: Callable[[Generator, torch.Generator], Tensor],
    ) -> None:
        state, trained = self.folder / f"{kind}-{number}.state", self._sharded()
        progress = self._progress(f"{kind} stage {number}", optimiser)
        seed, own_loss = self._seed(kind, number), partial(loss, trained)
        average = fit(trained, own_loss, optimiser, state, seed, progress, self.setup)
        self.generator.load_state_dict(average, strict=False)

    def _flow(self, number: int, stage: FlowStage) -> None:
        self.generator.step_spread.copy_(self.latents.step_spread())

        def loss(trained: Generator, rng: torch.Generator) -> Tensor:
            return generator_loss(trained, self.latents, stage, rng)

        self._fit("generator", number, stage.optimiser, loss)

    def _distil(self, number: int, stage: ConsistencyStage, teacher: Generator) -> None:
        def loss(student: Generator, rng: torch.Generator) -> Tensor:
            batch = self.latents.draw(student.profile, stage, rng).to(student.step_spread.device)
            return consistency_loss(student, teacher, batch, stage, rng)

        self._fit("consistency", number, stage.optimiser, loss)

    def _regress(self, number: int, stage: TrajectoryStage, teacher: Generator) -> None:
        fade = torch.ones(len(self.generator.step_spread))
        if stage.worn:
            rng = numbers(self._seed("trajectory", number), 0, 1)
            with self.setup.autocast():
                fade = measure_fade(self.generator, self.latents, stage, rng)
            left = f"{stage.fade_blocks} blocks leaves {float(fade.mean()):.2f} of its detail"
            self.report(f"trajectory stage {number}: a rollout of {left}")

        def loss(student: Generator, rng: torch.Generator) -> Tensor:
            batch = self.latents.draw(student.profile, stage, rng).to(student.step_spread.device)
            return trajectory_loss(student, teacher, batch, stage, fade, rng)

        self._fit("trajectory", number, stage.optimiser, loss)

    def _anchor(self, number: int, stage: AnchoredStage, teacher: Generator) -> None:
        device = self.generator.step_spread.device
        anchor = fit_anchor(self.latents).to(device)
        rng = numbers(self._seed("anchored", number), 0, 1)
        with self.setup.autocast():
            flights = own_flights(self.generator, self.latents, stage, rng)
        kept = f"{len(flights.z)} of {stage.flights} flights of {stage.flight_blocks} blocks"
        self.report(f"anchored stage {number}: {kept} have not run away")

        def loss(student: Generator, rng: torch.Generator) -> Tensor:
            true, own = (x.draw(student.profile, stage, rng) for x in (self.latents, flights))
            errors = level_errors(self.latents, true.previous, rng).to(device)
            true, own = true.to(device), own.to(device)
            return anchored_loss(student, teacher, true, errors, own, anchor, stage, rng)

        self._fit("anchored", number, stage.optimiser, loss)

    def _play(self, number: int, stage: AdversarialStage, adapted: Generator) -> None:
        if stage.blocks > (available := self.latents.conditions.shape[1]):
            raise InputError(
                f"adversarial stage {number} wants segments of {stage.blocks} blocks, "
                f"the clips have {available}",
                "make longer ones, as those were made, with: "
                f"aapt train data FOLDER --blocks {stage.blocks}",
            )
        seed = self._seed("adversarial", number)
        torch.manual_seed(seed)  # of the discriminator's heads
        discriminator = Discriminator(self.generator.profile, stage.attention, stage.logits)
        discriminator = discriminator.to(self.setup.device)
        discriminator.checkpointing = self.setup.checkpointing
        if number == 1:
            discriminator.start_from(adapted)
        else:
            load_part(self.folder / f"discriminator-{number - 1}.safetensors", discriminator)
        trained, discriminator = self._sharded(), self.setup.shared(discriminator)
        judge = dataclasses.replace(stage.optimiser, learning_rate=stage.discriminator_rate)
        learners = [
            Learner("generator", trained, stage.optimiser),
            Learner("discriminator", discriminator, judge),
        ]

        def update(rng: torch.Generator, step: int, scale: float) -> dict[str, Tensor]:
            networks = trained, discriminator
            return adversarial_update(*networks, self.latents, stage, rng, step, scale)

        state = self.folder / f"adversarial-{number}.state"
        progress = self._progress(f"adversarial stage {number}", stage.optimiser)
        fit_together(learners, update, stage.optimiser, state, seed, progress, self.setup)
        final = {name: unsharded(tensor) for name, tensor in discriminator.state_dict().items()}
        if self.setup.writes:
            save_tensors(self.folder / f"discriminator-{number}.safetensors", final)
        self.generator.load_state_dict(learners[0].averaged(), strict=False)
