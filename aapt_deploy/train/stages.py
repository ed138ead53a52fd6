"""The stages of the generator in their order, each of which leaves one file in the run's folder and is skipped when it is there."""

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
from aapt_deploy.train.processes import ALONE, Setup, whole
from aapt_deploy.train.recipe import AdversarialStage, AnchoredStage, ConsistencyStage, FlowStage, Optimiser, Recipe, TrajectoryStage

ONE_STEP = (1.0,)
SEEDS = {
    "generator": 0,
    "consistency": 1000,
    "adversarial": 2000,
    "trajectory": 3000,
    "anchored": 4000,
}  # so that no two stages draw the same numbers


def part(path: Path, module: nn.Module, make: Callable[[], None], setup: Setup = ALONE, together: bool = True) -> None:
    """Run `make`, which trains `module`, unless `path` already holds its result. Raises CheckpointError if that is damaged.

    Of several processes all run `make`, or, if they do not work `together`, the first one, and the others load what it wrote.
    """
    done = path.exists()
    setup.wait()  # all look before one writes
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
        raise CheckpointError(f"part {path} of an earlier run cannot be used: {error}", "delete it to train this part again") from None


def save_part(path: Path, module: nn.Module) -> None:
    save_tensors(path, module.state_dict())


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def generator_loss(generator: Generator, latents: Latents, stage: FlowStage, rng: torch.Generator) -> Tensor:
    """One batch's flow loss: along the generator's own rollout in a share `stage.forced` of the batches, else under teacher forcing."""
    forced = coin(rng, 0) < stage.forced
    batch = latents.draw(generator.profile, stage, rng).to(generator.step_spread.device)
    return forced_flow_loss(generator, batch, stage, rng) if forced else flow_loss(generator, batch, stage, rng)


@dataclass(frozen=True)
class GeneratorStages:
    """`generator` goes through the stages; the other fields say with what, and where to."""

    generator: Generator
    latents: Latents
    recipe: Recipe
    run: Path
    report: Callable[[str], None]
    setup: Setup

    def all(self, adapted: bool, distilled: Path | None) -> Iterator[tuple[str, tuple[float, ...] | None]]:
        """Run the stages, naming each and its sampler's times (None: the profile's) when `generator` holds its result.

        adapted: the generator comes from flow matching. distilled: a checkpoint that stands in for distillation.
        """
        self.generator.checkpointing = self.setup.checkpointing
        if not adapted:
            for number, stage in enumerate(self.recipe.flow, start=1):
                part(self.run / f"generator-{number}.safetensors", self.generator, partial(self._flow, number, stage), self.setup)
        yield "adapted", None
        teacher = copy.deepcopy(self.generator)
        if distilled is not None:
            self._take(distilled)
            yield "distilled", ONE_STEP
        else:
            for number, distillation in enumerate(self.recipe.consistency, start=1):
                part(self.run / f"consistency-{number}.safetensors", self.generator, partial(self._distil, number, distillation, teacher), self.setup)
                yield f"consistency-{number}", ONE_STEP
            for number, regression in enumerate(self.recipe.trajectory, start=1):
                part(self.run / f"trajectory-{number}.safetensors", self.generator, partial(self._regress, number, regression, teacher), self.setup)
                yield f"trajectory-{number}", ONE_STEP
        for number, game in enumerate(self.recipe.adversarial, start=1):
            part(self.run / f"adversarial-{number}.safetensors", self.generator, partial(self._play, number, game, teacher), self.setup)
            yield f"adversarial-{number}", game.timesteps
        before = copy.deepcopy(self.generator)
        for number, anchored in enumerate(self.recipe.anchored, start=1):
            part(self.run / f"anchored-{number}.safetensors", self.generator, partial(self._anchor, number, anchored, before), self.setup)
            yield f"anchored-{number}", ONE_STEP

    def _take(self, path: Path) -> None:
        """The weights of another checkpoint. Raises InputError when it is of another shape."""
        held = checkpoint.load(path)
        if held.profile.replace(sampler=self.generator.profile.sampler, name=self.generator.profile.name) != self.generator.profile:
            raise InputError(f"checkpoint {path} has another profile than the run", "give checkpoints of one model; their samplers may differ")
        self.generator.load_state_dict(held.generator.state_dict())

    def _told(self, name: str, optimiser: Optimiser) -> Callable[[int, float], None]:
        return lambda step, loss: self.report(f"{name}: {step} of {optimiser.steps} updates, loss {loss:.4f}")

    def _shared(self) -> Generator:
        """The generator to train: itself, or a sharded copy."""
        return self.generator if self.setup.mesh is None else self.setup.shared(copy.deepcopy(self.generator))

    def _fit(self, kind: str, number: int, optimiser: Optimiser, loss: Callable[[Generator, torch.Generator], Tensor]) -> None:
        state, seed, trained = self.run / f"{kind}-{number}.state", self.recipe.seed + SEEDS[kind] + number, self._shared()
        average = fit(trained, partial(loss, trained), optimiser, state, seed, self._told(f"{kind} stage {number}", optimiser), self.setup)
        self.generator.load_state_dict(average, strict=False)

    def _flow(self, number: int, stage: FlowStage) -> None:
        self.generator.step_spread.copy_(self.latents.step_spread())
        self._fit("generator", number, stage.optimiser, lambda trained, rng: generator_loss(trained, self.latents, stage, rng))

    def _distil(self, number: int, stage: ConsistencyStage, teacher: Generator) -> None:
        def loss(student: Generator, rng: torch.Generator) -> Tensor:
            batch = self.latents.draw(student.profile, stage, rng).to(student.step_spread.device)
            return consistency_loss(student, teacher, batch, stage, rng)

        self._fit("consistency", number, stage.optimiser, loss)

    def _regress(self, number: int, stage: TrajectoryStage, teacher: Generator) -> None:
        fade = torch.ones(len(self.generator.step_spread))
        if stage.worn:
            with self.setup.autocast():
                fade = measure_fade(self.generator, self.latents, stage, numbers(self.recipe.seed + SEEDS["trajectory"] + number, 0, 1))
            self.report(f"trajectory stage {number}: a rollout of {stage.fade_blocks} blocks leaves {float(fade.mean()):.2f} of its detail")

        def loss(student: Generator, rng: torch.Generator) -> Tensor:
            batch = self.latents.draw(student.profile, stage, rng).to(student.step_spread.device)
            return trajectory_loss(student, teacher, batch, stage, fade, rng)

        self._fit("trajectory", number, stage.optimiser, loss)

    def _anchor(self, number: int, stage: AnchoredStage, teacher: Generator) -> None:
        anchor = fit_anchor(self.latents).to(self.generator.step_spread.device)
        with self.setup.autocast():
            flights = own_flights(self.generator, self.latents, stage, numbers(self.recipe.seed + SEEDS["anchored"] + number, 0, 1))
        self.report(f"anchored stage {number}: {len(flights.z)} of {stage.flights} flights of {stage.flight_blocks} blocks have not run away")

        def loss(student: Generator, rng: torch.Generator) -> Tensor:
            true, own = (source.draw(student.profile, stage, rng) for source in (self.latents, flights))
            device, errors = student.step_spread.device, level_errors(self.latents, true.previous, rng)
            return anchored_loss(student, teacher, true.to(device), errors.to(device), own.to(device), anchor, stage, rng)

        self._fit("anchored", number, stage.optimiser, loss)

    def _play(self, number: int, stage: AdversarialStage, adapted: Generator) -> None:
        if stage.blocks > (available := self.latents.conditions.shape[1]):
            raise InputError(
                f"adversarial stage {number} wants segments of {stage.blocks} blocks, the clips have {available}",
                f"make longer ones, as those were made, with: aapt train data FOLDER --blocks {stage.blocks}",
            )
        seed = self.recipe.seed + SEEDS["adversarial"] + number
        torch.manual_seed(seed)  # of the discriminator's heads
        discriminator = Discriminator(self.generator.profile, stage.attention, stage.logits).to(self.setup.device)
        discriminator.checkpointing = self.setup.checkpointing
        if number == 1:
            discriminator.start_from(adapted)
        else:
            load_part(self.run / f"discriminator-{number - 1}.safetensors", discriminator)
        trained, discriminator = self._shared(), self.setup.shared(discriminator)
        judge = dataclasses.replace(stage.optimiser, learning_rate=stage.discriminator_rate)
        learners = [Learner("generator", trained, stage.optimiser), Learner("discriminator", discriminator, judge)]

        def update(rng: torch.Generator, step: int, scale: float) -> dict[str, Tensor]:
            return adversarial_update(trained, discriminator, self.latents, stage, rng, step, scale)

        told = self._told(f"adversarial stage {number}", stage.optimiser)
        fit_together(learners, update, stage.optimiser, self.run / f"adversarial-{number}.state", seed, told, self.setup)
        final = {name: whole(tensor) for name, tensor in discriminator.state_dict().items()}
        if self.setup.writes:
            save_tensors(self.run / f"discriminator-{number}.safetensors", final)
        self.generator.load_state_dict(learners[0].averaged(), strict=False)
