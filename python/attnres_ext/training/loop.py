"""The training loop: several arms, one batch, one step each, again and again.

All arms are alive at once and take turns within a step. A machine that is busy for a minute then
slows every arm alike, and the ratio of two arms' times stays honest. Everything random in a step is
drawn from generators seeded by (seed, step), so a run that is resumed continues as if nothing had
happened: on a CPU bit for bit, with as many threads. On a GPU attention and flash-linear-attention
add in an order, and choose kernels, that differ from run to run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from attnres_ext.models.kimi_linear.shards import gathered
from attnres_ext.training.data import Corpus, step_seed
from attnres_ext.training.distributed import World, synchronize_gradients
from attnres_ext.training.errors import UserError
from attnres_ext.training.preparation import prepare
from attnres_ext.training.settings import Settings

if TYPE_CHECKING:
    from attnres_ext.training.pipeline import Pipeline


@dataclass
class Arm:
    """One model in training.

    Attributes:
        residual: Residual mode of the model.
        seed: Seed of its weights and batches.
        model: The model, on its device.
        optimizer: AdamW over all its parameters; in a pipeline over those of this process.
        pipeline: This process's stages of the model, if it is in a pipeline.
    """

    residual: str
    seed: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    pipeline: Pipeline | None = None

    @property
    def name(self) -> str:
        """Name that is unique within a run, and its folder in a checkpoint."""
        return f"{self.residual}-seed{self.seed}"

    @property
    def num_parameters(self) -> int:
        """Number of trainable weights."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def parts(self) -> list[nn.Module]:
        """What of the model runs in this process: all of it, or its stages."""
        return [self.model] if self.pipeline is None else self.pipeline.modules

    def train(self, mode: bool = True) -> None:
        """As of a module."""
        for part in self.parts:
            part.train(mode)


@dataclass(frozen=True)
class Record:
    """What one arm did in one step; a line of ``metrics.jsonl``.

    Attributes:
        arm: Residual mode.
        seed: Seed of the arm.
        step: Optimizer steps done; 0 is before the first.
        tokens: Training tokens seen.
        loss: Cross entropy of the step's batch before the update, nats a token; None at step 0.
        val_loss: Cross entropy on the held-out text after the update; None between validations.
        lr: Learning rate of the step; None at step 0.
        grad_norm: Gradient norm before clipping; None at step 0.
        ms: Wall time of forward, backward and update in milliseconds; None at step 0.
    """

    arm: str
    seed: int
    step: int
    tokens: int
    loss: float | None
    val_loss: float | None
    lr: float | None
    grad_norm: float | None
    ms: float | None


def build_arms(
    settings: Settings, make_model: Callable[[str], nn.Module], world: World | None = None
) -> list[Arm]:
    """Builds every arm; arms of one seed start from the same weights.

    Args:
        settings: The run's settings.
        make_model: Gives a freshly initialised model for a residual mode. Parameters that two
            modes share by name and shape are copied from the first mode's model.
        world: The processes that train it; None is this one alone.

    Raises:
        UserError: A batch cannot be shared out evenly.
    """
    world = world or World(device=settings.device)
    parts = world.shares * settings.gradient_accumulation
    if settings.batch_size % parts:
        raise UserError(
            f"--batch-size {settings.batch_size} cannot be shared out evenly: {world.shares} "
            f"processes times --gradient-accumulation {settings.gradient_accumulation} are "
            f"{parts} parts"
        )
    arms = []
    for seed in settings.seeds:
        first: dict[str, torch.Tensor] | None = None
        for residual in settings.residuals:
            torch.manual_seed(seed)
            model = make_model(residual)
            if world.split is None:
                model = model.to(world.device)
            state = model.state_dict()
            if first is None:
                # Sharding leaves nothing in the model's own tensors.
                first = {name: tensor.clone() for name, tensor in state.items()}
            for name, tensor in state.items():
                if name in first and first[name].shape == tensor.shape:
                    tensor.copy_(first[name])
            prepare(model, world, settings.compile, settings.activation_checkpointing)
            pipeline = None if world.split is None else _pipeline(model, settings, world)
            optimizer = make_optimizer(model, settings)
            arms.append(Arm(residual, seed, model, optimizer, pipeline))
    return arms


def _pipeline(model: nn.Module, settings: Settings, world: World) -> Pipeline:
    from attnres_ext.training.pipeline import Pipeline  # where torch can be built on

    return Pipeline(
        model,
        world,
        settings.gradient_accumulation,
        loss=partial(_part_loss, settings=settings),
        autocast=partial(_autocast, settings, world),
    )


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW that decays matrices only: norms, gains, biases and pseudo-queries are 1-D.

    What other processes train is on the meta device.
    """
    parameters = [parameter for parameter in model.parameters() if not parameter.is_meta]
    decayed = [parameter for parameter in parameters if parameter.ndim >= 2]
    kept = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate(settings: Settings, step: int) -> float:
    """Learning rate of 1-based ``step``: linear warm-up, then a cosine down to its final share."""
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    remaining = max(1, settings.steps - settings.warmup_steps)
    progress = (step - settings.warmup_steps) / remaining
    cosine = (1 + math.cos(math.pi * progress)) / 2
    floor = settings.final_learning_rate
    return settings.learning_rate * (floor + (1 - floor) * cosine)


def train(
    arms: Sequence[Arm],
    corpus: Corpus,
    settings: Settings,
    first_step: int,
    world: World | None = None,
) -> Iterator[list[Record]]:
    """Trains all arms side by side.

    Args:
        arms: The arms, at the state after ``first_step - 1`` steps.
        corpus: Where batches come from.
        settings: The run's settings.
        first_step: 1-based step to begin with; 1 also validates the untrained arms.
        world: The processes that train; None is this one alone. All yield the same losses.

    Yields:
        The records of each step, one per arm in the order of ``arms``. Between two yields the arms
        are consistent and may be saved.

    Raises:
        UserError: A loss is no longer finite.
    """
    world = world or World(device=settings.device)
    tokens = settings.batch_size * settings.sequence_length
    if first_step == 1:
        yield [
            Record(
                arm.residual, arm.seed, 0, 0, None, validate(arm, corpus, settings, world),
                lr=None, grad_norm=None, ms=None,
            )
            for arm in arms
        ]  # fmt: skip
    for step in range(first_step, settings.steps + 1):
        rate = learning_rate(settings, step)
        records: dict[str, Record] = {}
        # Whoever goes first pays for cold caches, so it is someone else each step.
        turn = step % len(arms)
        for arm in [*arms[turn:], *arms[:turn]]:
            inputs, targets = corpus.batch(
                arm.seed, step, settings.batch_size, settings.sequence_length
            )
            torch.manual_seed(step_seed(arm.seed, step))
            start = time.perf_counter()
            loss, norm = _step(arm, inputs, targets, rate, settings, world)
            if world.device.startswith("cuda"):
                torch.cuda.synchronize(world.device)
            elapsed = (time.perf_counter() - start) * 1e3
            records[arm.name] = Record(
                arm.residual, arm.seed, step, step * tokens, loss, None, rate, norm, elapsed
            )
        if step % settings.validate_every == 0 or step == settings.steps:
            for arm in arms:
                value = validate(arm, corpus, settings, world)
                records[arm.name] = _with_validation(records[arm.name], value)
        yield [records[arm.name] for arm in arms]


def _step(
    arm: Arm,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    rate: float,
    settings: Settings,
    world: World,
) -> tuple[float, float]:
    for group in arm.optimizer.param_groups:
        group["lr"] = rate
    arm.train()
    total = _loss(arm, world.share(inputs), world.share(targets), settings, world)
    norm = _clip_gradients(arm, settings.gradient_clip)
    # One wait for the device instead of two.
    loss_value, norm_value = torch.stack([world.mean(total), norm.float()]).tolist()
    if not math.isfinite(loss_value) or not math.isfinite(norm_value):
        raise UserError(
            f"arm {arm.name}: the loss is {loss_value} and the gradient norm {norm_value} at a "
            f"learning rate of {rate:.3g}; try a smaller --learning-rate"
        )
    arm.optimizer.step()
    arm.optimizer.zero_grad(set_to_none=True)
    arm.model.update_router_bias(process_group=world.group)
    return loss_value, norm_value


def _loss(
    arm: Arm,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    settings: Settings,
    world: World,
) -> torch.Tensor:
    """The mean cross entropy, computed in parts; where gradients are enabled, they add up in the
    parameters."""
    if arm.pipeline is not None:
        return arm.pipeline.loss(inputs, targets)
    total = torch.zeros((), device=world.device)
    count = settings.gradient_accumulation
    parts = zip(inputs.chunk(count), targets.chunk(count), strict=True)
    for i, (part, its_targets) in enumerate(parts):
        synchronize_gradients(arm.model, wanted=i == count - 1)
        with _autocast(settings, world):
            logits = arm.model(part.to(world.device)).logits
        loss = _part_loss(logits, its_targets.to(world.device), settings)
        if torch.is_grad_enabled():
            loss.backward()
        total += loss.detach()
    return total


def _part_loss(logits: torch.Tensor, targets: torch.Tensor, settings: Settings) -> torch.Tensor:
    """What one of the parts adds to the mean over all of them."""
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    return loss / settings.gradient_accumulation


def _clip_gradients(arm: Arm, most: float) -> torch.Tensor:
    if arm.pipeline is not None:
        return arm.pipeline.clip_gradients(most)
    return gathered(nn.utils.clip_grad_norm_(arm.model.parameters(), most))


def _autocast(settings: Settings, world: World) -> torch.autocast:
    device = world.device.partition(":")[0]
    narrow = settings.precision == "bfloat16"
    return torch.autocast(device, dtype=torch.bfloat16, enabled=narrow)


def _with_validation(record: Record, value: float) -> Record:
    return Record(**{**vars(record), "val_loss": value})


@torch.no_grad()
def validate(arm: Arm, corpus: Corpus, settings: Settings, world: World | None = None) -> float:
    """Mean cross entropy on the held-out text, nats a token."""
    world = world or World(device=settings.device)
    arm.train(False)
    losses = [
        _loss(arm, world.share(inputs), world.share(targets), settings, world)
        for inputs, targets in _validation(corpus, settings)
    ]
    return world.mean(torch.stack(losses).double().mean()).item()


@torch.no_grad()
def depth_weights(
    arm: Arm, corpus: Corpus, settings: Settings, world: World | None = None
) -> list[list[float]]:
    """Mean depth-attention weights over the held-out text.

    Returns:
        One list per site, output site last, with a weight for each of its sources.
    """
    world = world or World(device=settings.device)
    arm.train(False)
    if arm.pipeline is not None:
        # When it begins to evaluate, torch sends a microbatch ahead, which is not to be counted.
        _loss(arm, *next(_validation(corpus, settings)), settings, world)
    # Every process looks at all of the text: it is little, and their counts need no adding up.
    with ExitStack() as stack:
        residuals = [part.model.residual for part in arm.parts]
        records = [stack.enter_context(residual.recording()) for residual in residuals]
        for inputs, targets in _validation(corpus, settings):
            _loss(arm, inputs, targets, settings, world)
    found = {site: weights for record in records for site, weights in record.weights.items()}
    if arm.pipeline is not None:
        found = arm.pipeline.merged(found)
    return [weights.tolist() for _, weights in sorted(found.items())]


def _validation(corpus: Corpus, settings: Settings) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return corpus.validation_batches(
        settings.validation_batches, settings.batch_size, settings.sequence_length
    )
