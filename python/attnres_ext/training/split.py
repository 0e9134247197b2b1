"""How the processes of a pipeline share a model's layers; checked before any of them waits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnres_ext.parallel.split import place_stages, split_evenly
from attnres_ext.training.errors import UserError

if TYPE_CHECKING:
    from attnres_ext.models.kimi_linear.configuration import KimiLinearConfig
    from attnres_ext.training.settings import Settings

__all__ = ["SCHEDULES", "Split"]


@dataclass(frozen=True)
class _Schedule:
    """What a schedule of ``torch.distributed.pipelining`` asks for.

    Attributes:
        stages: Stages of a process; None is any number from two on.
        placement: Where they are; see :func:`attnres_ext.parallel.place_stages`.
        fills: Whether it needs at least as many microbatches as there are stages.
        halves: Whether gradients of inputs come first and those of weights later.
    """

    stages: int | None
    placement: str = "loop"
    fills: bool = False
    halves: bool = False


_SCHEDULES = {
    "GPipe": _Schedule(stages=1),
    "1F1B": _Schedule(stages=1, fills=True),
    "Interleaved1F1B": _Schedule(stages=None),
    "ZBVZeroBubble": _Schedule(stages=2, placement="v", halves=True),
    "DualPipeV": _Schedule(stages=2, placement="v", fills=True, halves=True),
}
#: Names of schedules, torch's.
SCHEDULES = tuple(_SCHEDULES)


@dataclass(frozen=True)
class Split:
    """A pipeline's stages and when they run.

    Attributes:
        num_ranks: Processes, ``P``.
        stages_per_rank: Stages of each, ``V``.
        schedule: One of :data:`SCHEDULES`.
    """

    num_ranks: int
    stages_per_rank: int
    schedule: str

    @classmethod
    def of(cls, num_ranks: int, stages_per_rank: int | None, schedule: str) -> Split:
        """A split; ``stages_per_rank`` None means as few as the schedule allows.

        Raises:
            UserError: The schedule has another number of stages.
        """
        fixed = _SCHEDULES[schedule].stages
        if stages_per_rank is None:
            stages_per_rank = fixed or 2
        if stages_per_rank != fixed if fixed else stages_per_rank < 2:
            wanted = fixed or "at least 2"
            raise UserError(
                f"--virtual is {stages_per_rank}, expected {wanted}: so many stages has "
                f"--schedule {schedule} on each process"
            )
        return cls(num_ranks, stages_per_rank, schedule)

    @property
    def num_stages(self) -> int:
        """Stages of all processes."""
        return self.num_ranks * self.stages_per_rank

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each stage."""
        placement = _SCHEDULES[self.schedule].placement
        return place_stages(self.num_ranks, self.stages_per_rank, placement)

    def layers(self, config: KimiLinearConfig) -> tuple[int, ...]:
        """How many layers each stage has."""
        return split_evenly(config.num_hidden_layers, self.num_stages)

    def check(self, config: KimiLinearConfig, settings: Settings, num_processes: int) -> None:
        """Looks for what would be found only when all processes are there.

        Args:
            config: The model.
            settings: The run's; parts of a batch are the pipeline's microbatches.
            num_processes: How many processes there are.

        Raises:
            UserError: These do not go together; the sentence says which.
        """
        count = self.num_ranks
        if num_processes != count:
            raise UserError(
                f"--pipeline {count} needs {count} processes, and there "
                f"{'is' if num_processes == 1 else 'are'} {num_processes}: start it with torchrun "
                f"--nproc-per-node {count} -m attnres_ext train"
            )
        if config.num_hidden_layers < self.num_stages:
            raise UserError(
                f"--pipeline {count} with {self.stages_per_rank} on each makes {self.num_stages} "
                f"stages, and the model has {config.num_hidden_layers} layers: a stage needs one"
            )
        if config.tie_word_embeddings:
            raise UserError(
                f"--pipeline {count}: tie_word_embeddings is set, expected an embedding and a head "
                "of their own: they are in different stages"
            )
        self._check_microbatches(settings.gradient_accumulation)
        if _SCHEDULES[self.schedule].halves:
            self._check_halves(settings)
        try:
            import attnres_ext.parallel.pipeline  # noqa: F401
        except ImportError as error:
            raise UserError(f"--pipeline {count}: {error}") from error

    def _check_halves(self, settings: Settings) -> None:
        for option, given, reason in (
            ("--compile", settings.compile, "that of a compiled sublayer is one"),
            (
                "--activation-checkpointing",
                settings.activation_checkpointing,
                "the second would compute a sublayer again for each of its weights",
            ),
        ):
            if given:
                raise UserError(
                    f"{option} does not go with --schedule {self.schedule}, whose backward comes "
                    f"in two halves: {reason}"
                )

    def _check_microbatches(self, count: int) -> None:
        given = f"--gradient-accumulation {count}: --schedule {self.schedule}"
        if _SCHEDULES[self.schedule].fills and count < self.num_stages:
            raise UserError(
                f"{given} needs a microbatch for each of {self.num_stages} stages: raise "
                "--gradient-accumulation"
            )
        rounds = max(1, count // self.num_ranks)
        if self.schedule == "Interleaved1F1B" and count % rounds:
            raise UserError(
                f"{given} takes microbatches in rounds of equal size, {rounds} of them on "
                f"{self.num_ranks} processes: make it a multiple of {self.num_ranks}"
            )
