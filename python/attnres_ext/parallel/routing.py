"""Which block goes where in a pipeline: a pure function of the split and the ranks of the stages.

A site attends over every block that was finished before it, so every stage needs all of them, and a
pass that only hands on what it was given sends most blocks again and again. Cross-stage caching
(paper, Fig. 3) lets a rank with several stages keep a block; a *hop*,
from one stage to the next, then brings only what the receiver lacks.

Blocks are counted as a model counts them: 0 is the embedding, and block ``n`` is closed at site ``n
* sublayers_per_block``. Beside blocks, each hop carries the *sum*: the open block, with what was
written last added to it. Where a stage ends with the last sublayer of a block, the sum is that
block, and the next stage closes it at its first site.

Gradients come back the other way, and floating point remembers the order of a sum. One process adds
the gradients of a block from its last reader to its first, rounding at each. Ranks alternate along
that chain, so there are two ways to send them:

``"chained"``
    The sum so far goes back over every hop, and the stage adds to it as one process would: the same
    bits, cached or not. Values are cached; gradients travel as without a cache.
``"gathered"``
    Each rank gathers what its own stages add, and sends it once: over the hop that brought the
    block. As few tensors as forward, in an order of its own, the same in every run.

Plain data: no processes, no tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

__all__ = [
    "CACHES",
    "GRADIENTS",
    "BlockGradient",
    "Hop",
    "KeptBlock",
    "PipelinePlan",
    "StagePlan",
    "plan_pipeline",
]

#: What a rank keeps for its later stages: nothing; what it was sent or closed, as in the paper; or
#: also the blocks that it finished itself, which the next rank closes.
CACHES = ("nothing", "received", "own")
#: How gradients of blocks come back.
GRADIENTS = ("chained", "gathered")


@dataclass(frozen=True)
class BlockGradient:
    """What one stage does with the gradient of one block, in its backward.

    Attributes:
        block: Whose gradient.
        begins_with: What its buffer holds before the stage's own sites add to it, in the order of
            adding: ``"rank"``, what later stages of the same rank left there; ``"next"``, what the
            next stage sends back.
        sites: Which of the stage's sites add to it, in that order: from the last to the first.
        goes_to: ``"previous"``, back over the hop to the stage before; ``"rank"``, it is left for
            an earlier stage of the same rank; ``"sum"``, it joins the gradient of the sum: this
            stage closed the block at its last site in ``sites``, or finished it (then ``sites`` is
            empty, and the sum is what the stage hands on).
    """

    block: int
    begins_with: tuple[str, ...]
    sites: tuple[int, ...]
    goes_to: str


@dataclass(frozen=True)
class StagePlan:
    """One stage of a pipeline. Blocks are in ascending order everywhere.

    Attributes:
        index: Which stage.
        rank: Who runs it.
        first_site: Its first site.
        end_site: The site after its last one.
        receives: Blocks that the hop before brings, beside the sum; the first stage gets none.
        cached: Blocks that the rank has from its earlier stages. With ``receives`` they are all
            blocks that were closed before the first site.
        closes: Blocks that its sites close.
        finishes: The block that its last sublayer finishes and the next stage closes, if any.
        keeps: Blocks that the rank's later stages take from it.
        gradients: What its backward does with gradients of blocks, one entry a block.
    """

    index: int
    rank: int
    first_site: int
    end_site: int
    receives: tuple[int, ...]
    cached: tuple[int, ...]
    closes: tuple[int, ...]
    finishes: int | None
    keeps: tuple[int, ...]
    gradients: tuple[BlockGradient, ...]

    @property
    def sites(self) -> range:
        """Its sites; the output's is the last of the last stage."""
        return range(self.first_site, self.end_site)

    @property
    def begins_with(self) -> tuple[int, ...]:
        """All blocks that were closed before its first site."""
        return tuple(sorted(self.receives + self.cached))


@dataclass(frozen=True)
class Hop:
    """What goes from a stage to the next, for one microbatch: the sum, and one tensor a block.

    Attributes:
        index: The sending stage; the next one receives.
        sender: The sending rank.
        receiver: The receiving rank.
        blocks: Blocks that the receiver lacks.
        closed: All blocks that there are: what would be sent without a cache.
        gradients: Blocks whose gradients come back, beside the sum's.
    """

    index: int
    sender: int
    receiver: int
    blocks: tuple[int, ...]
    closed: tuple[int, ...]
    gradients: tuple[int, ...]

    @property
    def crosses(self) -> bool:
        """Whether it leads to another rank; else nothing is sent."""
        return self.sender != self.receiver


@dataclass(frozen=True)
class KeptBlock:
    """One block on one rank, for one microbatch.

    Attributes:
        rank: Who keeps it.
        block: What is kept.
        stage: Which stage brought it.
        by: How: ``"receiving"``, ``"closing"`` or ``"finishing"`` it.
        last_forward: The stage after whose forward it is given up where nothing is trained.
        last_backward: The stage after whose backward it is given up in training.
    """

    rank: int
    block: int
    stage: int
    by: str
    last_forward: int
    last_backward: int


@dataclass(frozen=True)
class PipelinePlan:
    """The routes of all blocks; see :func:`plan_pipeline`, which makes it.

    Attributes:
        num_sublayers: Sublayers of the model.
        sublayers_per_block: Sublayers of a block; None for the standard residual.
        num_microbatches: Microbatches of a step; each takes the same routes.
        cache: What ranks keep.
        gradients: How gradients of blocks come back.
        embedding_gradient: Whether the embedding gets a gradient.
        stages: One entry a stage.
        hops: One entry for each stage but the last.
        kept: What is kept on which rank until when, by rank, then block; without a cache by stage.
    """

    num_sublayers: int
    sublayers_per_block: int | None
    num_microbatches: int
    cache: str
    gradients: str
    embedding_gradient: bool
    stages: tuple[StagePlan, ...]
    hops: tuple[Hop, ...]
    kept: tuple[KeptBlock, ...]

    @property
    def num_stages(self) -> int:
        """How many stages there are."""
        return len(self.stages)

    @property
    def num_ranks(self) -> int:
        """How many ranks run them."""
        return 1 + max(stage.rank for stage in self.stages)

    def stages_of(self, rank: int) -> tuple[StagePlan, ...]:
        """The stages of a rank, in the order of the model."""
        return tuple(stage for stage in self.stages if stage.rank == rank)

    def kept_by(self, rank: int) -> tuple[KeptBlock, ...]:
        """What a rank keeps."""
        return tuple(kept for kept in self.kept if kept.rank == rank)

    @cached_property
    def hash(self) -> str:
        """16 hexadecimal digits that differ if anything in the plan does: ranks compare them."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def plan_pipeline(
    num_sublayers: int,
    sublayers_per_block: int | None,
    first_sites: Sequence[int],
    ranks: Sequence[int],
    *,
    num_microbatches: int = 1,
    cache: str = "own",
    gradients: str = "chained",
    embedding_gradient: bool = True,
) -> PipelinePlan:
    """Routes every block of a pipeline (paper, Fig. 3).

    Args:
        num_sublayers: Sublayers of the model; attention and MLP count one each.
        sublayers_per_block: Size of a block in sublayers, 1 for the full form, None for the
            standard residual.
        first_sites: The first site of each stage, ascending, from 0 (:func:`first_sites_of`). Only
            the first stage may be without a site: it has the embedding alone.
        ranks: The rank of each stage (:func:`place_stages`); any map to ranks from 0 that leaves
            none out.
        num_microbatches: Microbatches of a step.
        cache: What a rank keeps for its later stages. ``"nothing"`` sends every block over every
            hop. ``"received"`` keeps what a rank was sent or closed, as the paper does. ``"own"``
            also keeps a block that the rank finished and the next stage closes.
        gradients: ``"chained"`` or ``"gathered"``: see :mod:`attnres_ext.parallel.routing`.
        embedding_gradient: False if the embedding is frozen: then nothing is sent back for block 0.

    Raises:
        ValueError: For a split, a map or a choice that makes no pipeline; the message says why.
    """
    _check(num_sublayers, sublayers_per_block, first_sites, ranks, num_microbatches)
    for name, value, choices in (("cache", cache, CACHES), ("gradients", gradients, GRADIENTS)):
        if value not in choices:
            raise ValueError(
                f"plan_pipeline: {name} is {value!r}, expected one of {', '.join(choices)}"
            )
    router = _Router(num_sublayers, sublayers_per_block, first_sites, ranks, cache, gradients)
    first_gradient = 0 if embedding_gradient else 1
    stages = tuple(router.stage(index, first_gradient) for index in range(len(ranks)))
    hops = tuple(
        Hop(
            index=stage.index,
            sender=stage.rank,
            receiver=following.rank,
            blocks=following.receives,
            closed=following.begins_with,
            gradients=tuple(g.block for g in following.gradients if g.goes_to == "previous"),
        )
        for stage, following in pairwise(stages)
    )
    return PipelinePlan(
        num_sublayers=num_sublayers,
        sublayers_per_block=sublayers_per_block,
        num_microbatches=num_microbatches,
        cache=cache,
        gradients=gradients,
        embedding_gradient=embedding_gradient,
        stages=stages,
        hops=hops,
        kept=router.kept(),
    )


class _Router:
    """Follows one microbatch through the stages: who has which block from which stage on."""

    def __init__(
        self,
        num_sublayers: int,
        sublayers_per_block: int | None,
        first_sites: Sequence[int],
        ranks: Sequence[int],
        cache: str,
        gradients: str,
    ) -> None:
        self._block_size = sublayers_per_block
        self._ranks, self._gradients = ranks, gradients
        self._bounds = [*first_sites, num_sublayers + 1]
        self._output_site = num_sublayers
        # Who keeps: a rank, or without a cache each stage for itself.
        self._keepers = list(range(len(ranks))) if cache == "nothing" else list(ranks)
        self._stages_of: dict[int, list[int]] = {}
        for stage, keeper in enumerate(self._keepers):
            self._stages_of.setdefault(keeper, []).append(stage)
        # How each stage brings blocks to its keeper, and what keepers have by now.
        self._brings: list[dict[int, str]] = []
        known: dict[int, set[int]] = {keeper: set() for keeper in self._keepers}
        for stage, keeper in enumerate(self._keepers):
            brings = self._brought_by(stage, known[keeper], keeps_finished=cache == "own")
            self._brings.append(brings)
            known[keeper].update(brings)

    def _brought_by(self, stage: int, known: set[int], keeps_finished: bool) -> dict[int, str]:
        brings = {b: "receiving" for b in self._closed_before(stage) if b not in known}
        brings.update(dict.fromkeys(self._closes(stage), "closing"))
        finished, later = self._finishes(stage), self._later(stage)
        # If the next stage is the keeper's own, that one closes it.
        if keeps_finished and finished is not None and later and later[0] != stage + 1:
            brings[finished] = "finishing"
        return brings

    def _receives(self, stage: int) -> tuple[int, ...]:
        return tuple(b for b, by in self._brings[stage].items() if by == "receiving")

    def _closed_before(self, stage: int) -> range:
        """Blocks that were closed before the stage's first site."""
        if self._block_size is None:
            return range(0)
        return range(-(-self._bounds[stage] // self._block_size))

    def _closes(self, stage: int) -> range:
        """Blocks that the stage's sites close; after the output site nobody reads one."""
        if self._block_size is None:
            return range(0)
        end = min(self._bounds[stage + 1], self._output_site)
        return range(len(self._closed_before(stage)), -(-end // self._block_size))

    def _finishes(self, stage: int) -> int | None:
        """The block that the sum is when the stage hands it on."""
        end = self._bounds[stage + 1]
        if self._block_size is None or end >= self._output_site or end % self._block_size:
            return None
        return end // self._block_size

    def _later(self, stage: int) -> list[int]:
        """Later stages of the same keeper."""
        return [later for later in self._stages_of[self._keepers[stage]] if later > stage]

    def stage(self, stage: int, first_gradient: int) -> StagePlan:
        """One stage; blocks below ``first_gradient`` get no gradient."""
        receives, brings = self._receives(stage), self._brings[stage]
        blocks = [*self._closed_before(stage), *self._closes(stage)]
        gradients = [self._gradient(stage, block) for block in blocks]
        finished = self._finishes(stage)
        if finished in brings and self._gradients == "gathered":
            gradients.append(BlockGradient(finished, ("rank",), (), "sum"))
        return StagePlan(
            index=stage,
            rank=self._ranks[stage],
            first_site=self._bounds[stage],
            end_site=self._bounds[stage + 1],
            receives=receives,
            cached=tuple(b for b in self._closed_before(stage) if b not in receives),
            closes=tuple(self._closes(stage)),
            finishes=finished,
            keeps=tuple(sorted(brings)) if self._later(stage) else (),
            gradients=tuple(g for g in gradients if g.block >= first_gradient),
        )

    def _gradient(self, stage: int, block: int) -> BlockGradient:
        chained = self._gradients == "chained"
        first_reader = block * self._block_size
        is_last = stage == len(self._keepers) - 1
        begins_with = []
        if not chained and self._later(stage):
            begins_with.append("rank")
        if not is_last and (chained or block in self._receives(stage + 1)):
            begins_with.append("next")
        if block in self._closes(stage):
            goes_to = "sum"
        elif chained or block in self._receives(stage):
            goes_to = "previous"
        else:
            goes_to = "rank"
        sites = range(self._bounds[stage], self._bounds[stage + 1])
        return BlockGradient(
            block=block,
            begins_with=tuple(begins_with),
            sites=tuple(site for site in reversed(sites) if site >= first_reader),
            goes_to=goes_to,
        )

    def kept(self) -> tuple[KeptBlock, ...]:
        """What everyone keeps, in order."""
        kept = []
        for stage, brings in enumerate(self._brings):
            last = self._stages_of[self._keepers[stage]][-1]
            for block, by in brings.items():
                # What a stage only finished, it does not read.
                reader = self._later(stage)[0] if by == "finishing" else stage
                kept.append(KeptBlock(self._ranks[stage], block, stage, by, last, reader))
        return tuple(sorted(kept, key=lambda kept: (kept.rank, kept.block, kept.stage)))


def _check(
    num_sublayers: int,
    sublayers_per_block: int | None,
    first_sites: Sequence[int],
    ranks: Sequence[int],
    num_microbatches: int,
) -> None:
    for name, value in (
        ("num_sublayers", num_sublayers),
        ("sublayers_per_block", 1 if sublayers_per_block is None else sublayers_per_block),
        ("num_microbatches", num_microbatches),
    ):
        if value < 1:
            raise ValueError(f"plan_pipeline: {name} is {value}, expected at least 1")
    if not first_sites:
        raise ValueError("plan_pipeline: first_sites is empty, expected one site for each stage")
    if len(ranks) != len(first_sites):
        raise ValueError(
            f"plan_pipeline: ranks has {len(ranks)} entries, expected {len(first_sites)}, one for "
            "each stage in first_sites"
        )
    if first_sites[0] != 0:
        raise ValueError(f"plan_pipeline: first_sites begins with {first_sites[0]}, expected 0")
    for stage, (site, end) in enumerate(
        zip(first_sites, [*first_sites[1:], num_sublayers + 1], strict=True)
    ):
        if end < site or (end == site and stage > 0):
            raise ValueError(
                f"plan_pipeline: stage {stage} begins at site {site} and ends before site {end}, "
                f"expected at least one site in each stage after the first, of {num_sublayers + 1} "
                "in all"
            )
    if set(ranks) != set(range(max(ranks) + 1)):
        raise ValueError(
            f"plan_pipeline: ranks are {', '.join(map(str, sorted(set(ranks))))}, expected every "
            f"rank from 0 to {max(ranks)}"
        )
