"""Block representations sharded along the sequence over a tensor-parallel group.

Depth attention looks at one token at a time, so each rank can keep the blocks of its own tokens
alone: ``N * (T/P) * D`` values in the place of ``N * T * D`` (paper, "Inference"). Tensor-parallel
sublayers need all tokens, and end in a sum over the ranks. That all-reduce is split into its two
halves, and everything of ours runs between them, on ``T/P`` tokens: a *write* reduces and scatters,
a *read* adds, mixes and normalises, and gathers what the sublayer's own norm made of it. No more is
sent than the all-reduce did.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnres_ext.cache import BlockCache
from attnres_ext.parallel.shards import SequenceShards
from attnres_ext.randomness import register_as_argument
from attnres_ext.residual import AttentionResiduals
from attnres_ext.residual_state import ResidualState
from attnres_ext.suspended import SuspendedPass

__all__ = ["SequenceParallel", "SequenceState"]


class SequenceParallel:
    """:class:`AttentionResiduals` for models whose sublayers are split over a group of ranks.

    A model's forward stays what it is; its sublayers return this rank's addend of their output::

        parallel = SequenceParallel(residual, group)
        shards = parallel.shards(ids.shape[1])
        state = parallel.start(embed(shards.part(ids, dim=1)), shards)
        for site, (norm, sublayer) in enumerate(sublayers):
            state.write(sublayer(state.read(site, norm.weight, norm.eps)))
        hidden = state.read_output(final_norm.weight, final_norm.eps)
        loss(head(hidden), shards.part(targets, dim=1)).backward()
        parallel.reduce_gradients([embed.weight, head.weight, *norm_weights])

    Args:
        residual: The residual, the same on every rank.
        group: The ranks; None means all of them. A one-dimensional ``DeviceMesh`` will do.
        dim: Along which dimension of ``[..., D]`` the tokens are sharded.

    Raises:
        RuntimeError: If there is no process group yet.
        ValueError: If ``dim`` is the last dimension, ``D``.
    """

    def __init__(
        self,
        residual: AttentionResiduals,
        group: dist.ProcessGroup | dist.DeviceMesh | None = None,
        *,
        dim: int = -2,
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "SequenceParallel: there is no process group; call "
                "torch.distributed.init_process_group first"
            )
        if dim == -1:
            raise ValueError("SequenceParallel: dim is -1, the hidden size; expected a token's")
        if isinstance(group, dist.DeviceMesh):
            group = group.get_group()
        self.residual = residual
        self.group = dist.group.WORLD if group is None else group
        self.dim = dim

    def shards(self, length: int) -> SequenceShards:
        """Where the tokens of sequences of ``length`` tokens lie."""
        if length < 0:
            raise ValueError(f"SequenceParallel: length is {length}, expected at least 0")
        return SequenceShards(length, self.group, self.dim)

    def start(
        self, embedding: Tensor, shards: SequenceShards, cache: BlockCache | None = None
    ) -> SequenceState:
        """Begins a forward pass.

        Args:
            embedding: Source 0 of this rank's tokens: what an embedding made of
                ``shards.part(ids)``, or with an embedding that is split over the vocabulary
                ``shards.scatter_sum`` of its addends.
            shards: Where tokens lie.
            cache: Where blocks are kept for inference, of this rank's tokens (:meth:`new_cache`).

        Raises:
            ValueError: If ``embedding`` or ``cache`` does not fit.
        """
        shards.check_part("start: embedding", embedding)
        return SequenceState(self.residual.start(embedding, cache), shards)

    def resume(
        self, suspended: SuspendedPass, shards: SequenceShards, cache: BlockCache | None = None
    ) -> SequenceState:
        """Goes on with a forward pass that was suspended (:meth:`SequenceState.suspend`), as the
        next stage of a pipeline does.

        Args:
            suspended: Where it stopped: tensors of this rank's tokens.
            shards: Where tokens lie.
            cache: As for :meth:`start`.

        Raises:
            ValueError: If ``suspended`` or ``cache`` does not fit.
        """
        for index, tensor in enumerate(suspended.tensors):
            shards.check_part(f"resume: suspended.tensors[{index}]", tensor)
        return SequenceState(self.residual.resume(suspended, cache), shards)

    def new_cache(
        self,
        shape: int | Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        **options,
    ) -> BlockCache:
        """A block cache for this rank's tokens: ``1/P`` of what one device would need.

        A prompt may be prefilled in chunks, each of which starts a forward pass of its own: then
        the cache needs room for one chunk, and takes a shorter one as
        ``cache.resized(shards.part(chunk).shape)``.

        Args:
            shape: Leading shape of the whole, such as ``(batch, tokens)``, or the number of tokens.
            dtype: Of what is written.
            device: Where the slots are.
            options: As for :meth:`AttentionResiduals.new_cache`.
        """
        leading = [shape] if isinstance(shape, int) else list(shape)
        dim = self.dim if self.dim >= 0 else self.dim + 1
        leading[dim] = len(self.shards(leading[dim]).own)
        return self.residual.new_cache(leading, dtype=dtype, device=device, **options)

    @torch.no_grad()
    def reduce_gradients(self, parameters: Iterable[nn.Parameter] = ()) -> None:
        """Adds up gradients of what was used on each rank's own tokens, over the ranks.

        Call it once a step, after the last backward: it sums what was accumulated. Queries and key
        gains are such parameters, and so is each norm's gain that a read was given; the embedding
        and the head, where each rank applies the whole of them to its own tokens.

        Args:
            parameters: Such parameters beside the residual's own. Frozen ones are left alone.
        """
        wanted: dict[int, nn.Parameter] = {}
        for parameter in chain(self.residual.parameters(), parameters):
            if parameter.requires_grad:
                wanted[id(parameter)] = parameter
        by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for parameter in wanted.values():
            if parameter.grad is None:  # on a rank without tokens, say
                parameter.grad = torch.zeros_like(parameter)
            gradient = parameter.grad
            if hasattr(gradient, "to_local"):  # a DTensor: a shard, as FSDP has them
                gradient = gradient.to_local()
            by_kind.setdefault((gradient.dtype, gradient.device), []).append(gradient)
        for gradients in by_kind.values():
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat, group=self.group)
            parts = flat.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


class SequenceState:
    """A forward pass over shards: reads gather, writes reduce and scatter.

    Attributes:
        local: The state of this rank's tokens. Its own ``read`` and ``write`` are for sublayers
            that need no other tokens, such as experts that tokens are sent to.
        shards: Where tokens lie.
    """

    def __init__(self, local: ResidualState, shards: SequenceShards) -> None:
        self.local = local
        self.shards = shards

    @property
    def site(self) -> int:
        """The site to read next."""
        return self.local.site

    @property
    def _device(self) -> torch.device | None:
        return self.local._device

    def read(
        self, site: int, norm_weight: Tensor | None = None, norm_eps: float | None = None
    ) -> Tensor:
        """The input of sublayer ``site`` for all tokens, ``[..., T, ..., D]``.

        Arguments and errors as for :meth:`ResidualState.read`.
        """
        return self.shards.gather(self.local.read(site, norm_weight, norm_eps))

    def write(self, x: Tensor) -> None:
        """Adds a sublayer's output to the open block.

        Args:
            x: This rank's addend of the output for all tokens, ``[..., T, ..., D]``: the ranks' sum
                is what is written.

        Raises:
            ValueError: If ``x`` does not have all tokens.
            RuntimeError: As for :meth:`ResidualState.write`.
        """
        self.shards.check_whole("write: x", x)
        self.local.write(self.shards.scatter_sum(x))

    def read_output(
        self, norm_weight: Tensor | None = None, norm_eps: float | None = None
    ) -> Tensor:
        """The model's output for this rank's tokens; ``shards.gather`` makes it that of all.

        Arguments and errors as for :meth:`ResidualState.read_output`.
        """
        return self.local.read_output(norm_weight, norm_eps)

    def suspend(self) -> SuspendedPass:
        """Stops between two sites: this rank's tokens, and errors, as for
        :meth:`ResidualState.suspend`."""
        return self.local.suspend()


register_as_argument(SequenceState)
