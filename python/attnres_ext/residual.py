"""Attention Residuals as a module: what a model uses instead of ``x + f(x)``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from attnres_ext import _C
from attnres_ext.cache import BlockCache
from attnres_ext.devices import plan_device
from attnres_ext.ops import SAVE_LEVELS
from attnres_ext.recording import Record
from attnres_ext.residual_cached import CachedState
from attnres_ext.residual_state import ResidualState
from attnres_ext.residual_training import TrainingState
from attnres_ext.residual_variants import VARIANTS
from attnres_ext.suspended import SuspendedPass, check_resumable, describe_sites

__all__ = ["AttentionResiduals"]


@torch.compiler.assume_constant_result
def _two_phase_from_tokens(*question: Any) -> int:
    """From how many tokens on a block reads in two phases.

    A forward under ``torch.compile`` asks when it is traced.
    """
    return _threshold(*question)


@cache
def _threshold(
    num_sources: int,
    num_queries: int,
    hidden: int,
    itemsize: int,
    device: torch.device,
    training: bool,
) -> int:
    plan = _C.plan(
        num_sources=num_sources,
        num_queries=num_queries,
        num_tokens=1,
        hidden=hidden,
        itemsize=itemsize,
        training=training,
        **plan_device(device),
    )
    return plan.two_phase_from_tokens


class AttentionResiduals(nn.Module):
    """Softmax attention over depth in place of the residual stream (paper, section 3).

    A *site* is where a sublayer reads its input: site ``i`` feeds sublayer ``i``, and the last
    site, ``num_sublayers``, feeds the model's output. Every site owns a pseudo-query and a gain for
    its keys. Queries start at zero, so that a fresh model reads plain averages; they are
    one-dimensional float32 parameters, which weight decay conventionally skips.

    A model's forward::

        state = residual.start(embedding)
        for site, (norm, sublayer) in enumerate(sublayers):
            state.write(sublayer(state.read(site, norm.weight, norm.eps)))
        hidden = state.read_output(final_norm.weight, final_norm.eps)

    Args:
        hidden_size: ``D``, the size of a token's hidden vector.
        num_sublayers: How many sublayers write; attention and MLP count one each.
        mode: ``"block"`` sums the outputs of ``sublayers_per_block`` sublayers and attends over
            these sums, ``"full"`` attends over every sublayer's output, ``"standard"`` is the usual
            sum (no parameters of its own).
        sublayers_per_block: Size of a block in sublayers (Kimi K3's ``attn_res_block_size`` counts
            decoder layers: twice as many sublayers). The last block may be shorter. None makes
            about eight blocks. Only ``mode="block"`` uses it.
        eps: Epsilon of the key RMSNorm, and of the fused output norm where a read gives none.
        two_phase: Whether a block's sites read its finished blocks all at once (paper, Algorithm
            1). ``"auto"`` asks the traffic plan. Results are the same up to rounding.
        save: What reads keep for their backward besides their sources: ``"nothing"``, ``"stats"``
            or ``"output"``. Two phases keep phase 1's results, unless it is ``"nothing"``.
        device: Where the parameters are made.

    Raises:
        ValueError: For sizes below one, an unknown mode or an unknown choice; the message says
            which.

    Attributes:
        queries: ``num_sites`` parameters ``[D]``, float32, initially 0; the last is the output
            site's.
        key_weights: ``num_sites`` parameters ``[D]``, float32, initially 1.
        variant: What sets the mode apart from others (:mod:`attnres_ext.residual_variants`).
        sites: The sites whose parameters the module keeps: all, or after :meth:`keep_sites` those
            of a piece; the lists have None for the others.
    """

    def __init__(
        self,
        hidden_size: int,
        num_sublayers: int,
        *,
        mode: str = "block",
        sublayers_per_block: int | None = None,
        eps: float = 1e-6,
        two_phase: str | bool = "auto",
        save: str = "stats",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(
                f"AttentionResiduals: hidden_size is {hidden_size}, expected at least 1"
            )
        if num_sublayers < 1:
            raise ValueError(
                f"AttentionResiduals: num_sublayers is {num_sublayers}, expected at least 1"
            )
        if mode not in VARIANTS:
            raise ValueError(
                f"AttentionResiduals: mode is {mode!r}, expected one of {', '.join(VARIANTS)}"
            )
        if sublayers_per_block is not None and sublayers_per_block < 1:
            raise ValueError(
                f"AttentionResiduals: sublayers_per_block is {sublayers_per_block}, "
                "expected at least 1"
            )
        if two_phase not in ("auto", True, False):
            raise ValueError(
                f"AttentionResiduals: two_phase is {two_phase!r}, expected 'auto', True or False"
            )
        if save not in SAVE_LEVELS:
            raise ValueError(
                f"AttentionResiduals: save is {save!r}, expected one of {', '.join(SAVE_LEVELS)}"
            )
        if not eps >= 0:
            raise ValueError(f"AttentionResiduals: eps is {eps}, expected a number not below 0")

        self.hidden_size = hidden_size
        self.num_sublayers = num_sublayers
        self.mode = mode
        self.eps = eps
        self.two_phase = two_phase
        self.save = save
        self.variant = VARIANTS[mode].of(num_sublayers, sublayers_per_block)
        self.sublayers_per_block = self.variant.sublayers_per_block

        def vector() -> Tensor:
            return torch.empty(hidden_size, device=device, dtype=torch.float32)

        self.sites = range(self.num_sites)
        count = self.num_sites if self.variant.attends else 0
        # Made in inference mode, they could not be trained outside of it.
        with torch.inference_mode(False):
            self.queries = nn.ParameterList(nn.Parameter(vector()) for _ in range(count))
            self.key_weights = nn.ParameterList(nn.Parameter(vector()) for _ in range(count))
            if not self.variant.attends:
                self.register_buffer("zero_query", vector(), persistent=False)
            self.reset_parameters()
        if self.num_blocks + 1 > _C.max_sources:
            raise ValueError(
                f"AttentionResiduals: {self.num_blocks} blocks and the embedding make "
                f"{self.num_blocks + 1} sources, "
                f"at most {_C.max_sources} are supported; raise sublayers_per_block"
            )
        self._record: Record | None = None

    def reset_parameters(self) -> None:
        """Zero queries and unit gains: every site reads the plain average of its sources."""
        if not self.variant.attends:
            nn.init.zeros_(self.zero_query)
            return
        for site in self.sites:
            nn.init.zeros_(self.queries[site])
            nn.init.ones_(self.key_weights[site])

    def keep_sites(self, sites: range) -> None:
        """Drops the parameters of all other sites: a pipeline stage owns those that it reads.

        Names of parameters stay as they are, so one checkpoint serves every split. A pass is begun
        where site 0 is, and resumed elsewhere (:meth:`resume`).

        Args:
            sites: Sites that follow one another, of those that the module keeps so far; none, where
                a stage has the embedding alone.

        Raises:
            ValueError: If it is another range.
        """
        own = self.sites
        if not isinstance(sites, range):
            kind = type(sites).__name__
            raise TypeError(f"keep_sites: sites is a {kind}, expected a range")
        if sites.step != 1 or any(end not in own for end in (*sites[:1], *sites[-1:])):
            raise ValueError(
                f"keep_sites: sites is {sites}, expected sites that follow one another, of "
                f"{describe_sites(own)}"
            )
        self.sites = sites
        for site in own:
            if site not in sites and self.variant.attends:
                # A list has an entry for every site: what is None has no name among parameters.
                for vectors in (self.queries, self.key_weights):
                    delattr(vectors, str(site))
                    vectors[site] = None

    @property
    def num_sites(self) -> int:
        """How many reads a forward makes: one per sublayer and the output's."""
        return self.num_sublayers + 1

    def vectors_at(self, site: int) -> tuple[Tensor, Tensor | None]:
        """The pseudo-query ``[D]`` that ``site`` reads with, and its keys' gain ``[D]``, if any."""
        if not self.variant.attends:
            return self.zero_query, None
        return self.queries[site], self.key_weights[site]

    @property
    def num_blocks(self) -> int:
        """How many blocks the sublayers form, without the embedding; 0 in standard mode."""
        return self.variant.num_blocks

    def closes_block(self, site: int) -> bool:
        """Whether the sum that ``site`` reads last is a finished block (the embedding, at site
        0)."""
        return self.variant.closes_block(site)

    def num_blocks_before(self, site: int) -> int:
        """How many blocks, the embedding among them, are finished before ``site`` adds what was
        written."""
        return self.variant.num_blocks_before(site)

    def has_partial_before(self, site: int) -> bool:
        """Whether a sum is open before ``site`` adds what was written."""
        return site > 0 and not self.closes_block(site - 1)

    def sites_of_block(self, block: int) -> range:
        """The sites that read ``block`` (counted from 1) while it is open or just finished.

        They share their other sources, the embedding and the blocks before: phase 1 reads these
        once for all of them.
        """
        return self.variant.sites_of_block(block)

    def sources_at(self, site: int) -> list[str]:
        """Names of what ``site`` attends over, in order.

        Finished blocks come first, then the open block's running sum, ``"partial"``. The last block
        is finished at the output site, however short it is.

        Raises:
            IndexError: If there is no such site.
        """
        if not 0 <= site < self.num_sites:
            raise IndexError(f"sources_at: site is {site}, expected 0 to {self.num_sites - 1}")
        return self.variant.sources_at(site)

    def num_sources_at(self, site: int) -> int:
        """``len(sources_at(site))``."""
        return self.variant.num_sources_at(site)

    def start(self, embedding: Tensor | None, cache: BlockCache | None = None) -> ResidualState:
        """Begins a forward pass.

        Args:
            embedding: ``[..., D]``, source 0; None if the first write brings it.
            cache: Where blocks are kept in place. Inference only: nothing is differentiable, reads
                allocate their result, unless they are told where to put it or the cache has a place
                for it, and nothing else. Without it the state is differentiable.

        Returns:
            The state to read from and write to.

        Raises:
            ValueError: If ``embedding`` or ``cache`` does not fit the module.
        """
        if embedding is None and cache is None:
            return TrainingState(self, None)
        if not isinstance(embedding, Tensor):
            raise TypeError(f"start: embedding is a {type(embedding).__name__}, expected a tensor")
        if not embedding.is_floating_point():
            raise ValueError(
                f"start: embedding has dtype {embedding.dtype}, expected a floating point dtype"
            )
        if embedding.dim() < 1 or embedding.shape[-1] != self.hidden_size:
            raise ValueError(
                f"start: embedding has shape {tuple(embedding.shape)}, "
                f"expected [..., {self.hidden_size}]"
            )
        if cache is not None:
            return CachedState(self, cache, embedding)
        return TrainingState(self, embedding)

    def resume(self, suspended: SuspendedPass, cache: BlockCache | None = None) -> ResidualState:
        """Goes on with a forward pass that was suspended (:meth:`ResidualState.suspend`), in this
        process or another.

        Where a block in two phases is cut, each piece runs phase 1 for its own sites.

        Args:
            suspended: Where it stopped. To go backward through both pieces, give
                :meth:`SuspendedPass.detach` of it, and the gradients found to the first one's
                :meth:`SuspendedPass.backward`; tensors still connected to their graph work, too.
            cache: As for :meth:`start`; blocks and the open sum are copied into it.

        Returns:
            A state to read from, beginning with site ``suspended.site``, and to write to.

        Raises:
            ValueError: If ``suspended`` or ``cache`` does not fit the module, or another module
                keeps the site.
        """
        check_resumable(self, suspended)
        state = TrainingState(self, None) if cache is None else CachedState(self, cache)
        state._go_on(suspended)
        return state

    def new_cache(
        self,
        shape: int | Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        side_stream: torch.cuda.Stream | None = None,
        reuse_result: bool = False,
    ) -> BlockCache:
        """A block cache with as many slots as this module needs.

        Args:
            shape: Leading shape of the embeddings that a forward starts with (or the number of
                tokens).
            dtype: Their dtype.
            device: Their device; None means the default device.
            side_stream: Where phase 1 of a block runs while the current stream computes the
                sublayer before the block's first read; None means on the current stream, before it.
            reuse_result: Whether reads share one tensor for their results, which each of them
                overwrites: a sublayer must be through with what it read when it has written, and
                not write what it read.
        """
        return BlockCache(
            self.num_blocks + 1, shape, self.hidden_size, dtype=dtype, device=device,
            eps=self.eps, side_stream=side_stream, reuse_result=reuse_result,
        )  # fmt: skip

    @contextmanager
    def recording(self) -> Iterator[Record]:
        """Records the mean depth-attention weights of every read inside the ``with`` block.

        The weights are computed once more for it, without gradients: forwards inside are slower.
        """
        previous, self._record = self._record, Record()
        try:
            yield self._record
        finally:
            self._record = previous

    def reads_in_two_phases(self, block: int, state_like: Tensor, training: bool) -> bool:
        """Whether the sites of ``block`` read in two phases, for tensors like ``state_like``
        ``[..., D]``."""
        if not self.variant.attends:
            return False
        if self.two_phase != "auto":
            return self.two_phase
        threshold = _two_phase_from_tokens(
            block,  # the embedding and the blocks before
            len(self.sites_of_block(block)),
            self.hidden_size,
            state_like.element_size(),
            state_like.device,
            training,
        )
        return state_like.numel() // self.hidden_size >= threshold

    def extra_repr(self) -> str:
        """Sizes and mode, for ``print(module)``."""
        text = f"{self.hidden_size}, num_sublayers={self.num_sublayers}, mode={self.mode!r}"
        if self.variant.sized:
            text += (
                f", sublayers_per_block={self.sublayers_per_block}, num_blocks={self.num_blocks}"
            )
        if len(self.sites) < self.num_sites:
            text += f", sites {describe_sites(self.sites)}"
        return text
