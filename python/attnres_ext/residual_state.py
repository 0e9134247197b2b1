"""The state of one forward pass through Attention Residuals: whose turn it is, and what waits to be
added."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NoReturn, TypedDict

import torch
from torch import Tensor

from attnres_ext import ops
from attnres_ext.profiling import naming
from attnres_ext.residual_graph import CHECKPOINTS, Reads
from attnres_ext.suspended import SuspendedPass, describe_sites

if TYPE_CHECKING:
    from attnres_ext.residual import AttentionResiduals

__all__ = ["Reading", "ResidualState"]

_graph = torch.ops.attnres_residual


class Reading(TypedDict):
    """What a site reads with, as the functional API calls it; the keys' epsilon is the module's."""

    query: Tensor
    key_weight: Tensor | None
    out_weight: Tensor | None
    out_eps: float | None


class ResidualState(ABC):
    """Sites read in order, each followed by one write.

    What is written stays pending: the next read adds it to the open block in the kernel that also
    reads. The embedding is the first thing written, and a block of its own.

    A layer may be compiled by itself, with its reads and writes. What is called there is the same
    for every site (see :mod:`attnres_ext.residual_graph`): no number of a site is looked at, and
    nothing but what a graph may see.
    """

    # What graphs see, beside what waits to be written. None in a forward that is a single graph.
    _cursor: Tensor | None = None
    _width: torch.dtype | None = None  # of what is read

    _shape: torch.Size | None = None
    _device: torch.device | None = None

    def __init__(self, residual: AttentionResiduals, embedding: Tensor | None) -> None:
        self._residual = residual
        self._site = self._first_site = 0  # the next to read, and the first that was
        self._is_suspended = False
        self._pending: Tensor | None = embedding
        if embedding is not None:
            self._fit(embedding)
        if not torch.compiler.is_compiling():
            self._reads = Reads(self)
            self._cursor = self._reads.cursor()

    def __reduce_ex__(self, protocol: int) -> NoReturn:
        raise TypeError(
            "a residual state cannot be copied or pickled: it belongs to one forward pass, whose "
            "blocks two states would share; call start for each"
        )

    @property
    def pending(self) -> Tensor | None:
        """What was written and waits to be read, ``[..., D]``."""
        return self._pending

    def pass_on(self, x: Tensor) -> None:
        """Puts ``x`` ``[..., D]`` in the place of what waits to be read.

        For models whose layers hand on what they wrote, so that hooks and wrappers, which look for
        tensors among arguments and results, see it: ``x`` is what became of it on the way.

        Raises:
            RuntimeError: If nothing waits.
        """
        if self._pending is None:
            raise RuntimeError("pass_on: nothing was written since the last read")
        if not self.in_graph():
            self._check_written(x)
        self._pending = x

    def in_graph(self) -> bool:
        """Whether a layer is being compiled that does not begin the forward pass itself."""
        return torch.compiler.is_compiling() and self._cursor is not None

    @property
    def site(self) -> int:
        """The site to read next; ``num_sites`` once the output is read."""
        return self._site

    def write(self, x: Tensor) -> None:
        """Adds a sublayer's output ``[..., D]``, of the embedding's shape, to the open block.

        Raises:
            RuntimeError: If no read came since the last write, or the output site is read.
            ValueError: If ``x`` does not have the embedding's shape or device, or no floating
                point dtype.
            TypeError: If ``x`` is no tensor.
        """
        if self.in_graph():
            if self._pending is not None:
                raise RuntimeError("write: called twice before the next site was read")
            self._pending = x
            return
        self._check_going_on("write")
        if self._site == self._residual.num_sites:
            raise RuntimeError(
                "write: the output is read, this forward pass is over; call start for another one"
            )
        if self._pending is not None and self._site == 0:
            raise RuntimeError("write: site 0 is to be read first; start has written the embedding")
        if self._pending is not None:
            raise RuntimeError(
                f"write: called twice before site {self._site} was read; "
                "sites are read in turn, each followed by one write"
            )
        self._check_written(x)
        self._pending = x

    def suspend(self) -> SuspendedPass:
        """Stops here, between two sites; :meth:`AttentionResiduals.resume` goes on, in this process
        or another.

        This state can be neither read nor written any more. Gradients that come back for the
        tensors (:meth:`SuspendedPass.backward`) go on to what was read and written until now.

        Returns:
            Everything that the sites to come read.

        Raises:
            RuntimeError: If nothing was written yet, the output is read, the pass was suspended
                already, or a layer is being compiled that does not begin the pass itself.
        """
        if self.in_graph():
            raise RuntimeError(
                "suspend: a layer is being compiled that the pass did not begin in; suspend "
                "outside of it, or begin or resume the pass in what is compiled"
            )
        self._check_going_on("suspend")
        if self._site == self._residual.num_sites:
            raise RuntimeError("suspend: the output is read, nothing is left to go on with")
        if self._site == 0 and self._pending is None:
            raise RuntimeError("suspend: nothing was written yet, write the embedding first")
        suspended = self._suspend()
        self._is_suspended, self._pending = True, None
        return suspended

    def _check_going_on(self, call: str) -> None:
        if self._is_suspended:
            raise RuntimeError(
                f"{call}: this pass was suspended before site {self._site}; the module's resume "
                "goes on with it"
            )

    def _suspend(self) -> SuspendedPass:
        """What the sites to come read, and what waits for them."""
        raise NotImplementedError

    def _go_on(self, suspended: SuspendedPass) -> None:
        """Begins where another state was suspended."""
        self._site = self._first_site = suspended.site
        self._fit(suspended.tensors[0])
        for source in (*suspended.blocks, suspended.partial):
            if source is not None:
                self._widen(source)
        self._pending = suspended.pending

    def _sites_read_together(self, block: int) -> range:
        """The sites of ``block`` that phase 1 runs for: those that this state comes by."""
        sites, own = self._residual.sites_of_block(block), self._residual.sites
        return range(max(sites.start, self._first_site), min(sites.stop, own.stop))

    def _fit(self, embedding: Tensor) -> None:
        """What is written from now on is like ``embedding``."""
        self._shape, self._device = embedding.shape, embedding.device
        self._width = embedding.dtype

    def _check_written(self, x: Tensor) -> None:
        """Of what a graph writes, this is checked when it is read."""
        if not isinstance(x, Tensor):
            raise TypeError(f"write: x is a {type(x).__name__}, expected a tensor")
        if self._shape is None and x.shape[-1:] == (self._residual.hidden_size,):
            self._fit(x)
        if self._shape is None:
            raise ValueError(
                f"write: x has shape {tuple(x.shape)}, expected [..., "
                f"{self._residual.hidden_size}], the embedding"
            )
        if x.shape != self._shape:
            raise ValueError(
                f"write: x has shape {tuple(x.shape)}, "
                f"expected {tuple(self._shape)} as the embedding"
            )
        if x.device != self._device:
            raise ValueError(f"write: x is on {x.device}, expected {self._device} as the embedding")
        if not x.is_floating_point():
            raise ValueError(f"write: x has dtype {x.dtype}, expected a floating point dtype")

    def read(
        self, site: int, norm_weight: Tensor | None = None, norm_eps: float | None = None
    ) -> Tensor:
        """The input of sublayer ``site``: the mix of everything written so far, ``[..., D]``.

        Args:
            site: The sublayer that reads; sites are read in order.
            norm_weight: Gain ``[D]`` of the sublayer's own RMSNorm, which is then fused; None
                leaves the mix as it is.
            norm_eps: Epsilon of that norm; None takes the module's.

        Raises:
            RuntimeError: If it is another site's turn, or nothing was written since the last read.
            TypeError: If ``norm_weight`` is no tensor, but the norm itself, say.
        """
        if self.in_graph():
            return self._read_in_graph(norm_weight, norm_eps)
        num_sublayers = self._residual.num_sublayers
        if not 0 <= site < num_sublayers:
            raise ValueError(
                f"read: site is {site}, expected 0 to {num_sublayers - 1}; "
                "read_output reads the output site"
            )
        return self._take_turn(site, norm_weight, norm_eps)

    def read_output(
        self, norm_weight: Tensor | None = None, norm_eps: float | None = None
    ) -> Tensor:
        """The model's output: the mix over all blocks, ``[..., D]``. Arguments and errors as for
        :meth:`read`."""
        if self.in_graph():
            return self._read_in_graph(norm_weight, norm_eps)
        return self._take_turn(self._residual.num_sublayers, norm_weight, norm_eps)

    def _take_turn(self, site: int, norm_weight: Tensor | None, norm_eps: float | None) -> Tensor:
        self._check_going_on("read")
        if site != self._site:
            over = self._site == self._residual.num_sites
            turn = "every site is read" if over else f"site {self._site} is next"
            raise RuntimeError(
                f"read: site {site} was asked for, but {turn}; sites are read once and in order. "
                + CHECKPOINTS
            )
        self._check_kept(site)
        if self._pending is None:
            raise RuntimeError(
                f"read: nothing was written since site {site - 1} was read; "
                "write its sublayer's output first"
            )
        self._check_norm(norm_weight)
        delta, self._pending = self._pending, None
        self._widen(delta)
        self._site += 1
        query, key_weight = self._residual.vectors_at(site)
        reading = Reading(
            query=query, key_weight=key_weight, out_weight=norm_weight, out_eps=norm_eps
        )
        with naming(site):
            return self._read(site, delta, reading)

    def _check_kept(self, site: int) -> None:
        own = self._residual.sites
        # Of a number that changes from graph to graph, torch.compile asks no range.
        if not own.start <= site < own.stop:
            raise RuntimeError(
                f"read: site {site} is none of those that this module keeps, "
                f"{describe_sites(own)}; suspend the pass here, and resume it where the site is "
                "kept"
            )

    def _check_norm(self, norm_weight: Tensor | None) -> None:
        if norm_weight is not None and not isinstance(norm_weight, Tensor):
            raise TypeError(
                f"read: norm_weight is a {type(norm_weight).__name__}, expected its weight, a "
                "tensor"
            )
        if norm_weight is not None and norm_weight.shape != (self._residual.hidden_size,):
            raise ValueError(
                f"read: norm_weight has shape {tuple(norm_weight.shape)}, "
                f"expected ({self._residual.hidden_size},)"
            )

    def _widen(self, delta: Tensor) -> None:
        if self._width is None:
            self._width = delta.dtype
        elif delta.dtype != self._width:
            self._width = torch.promote_types(self._width, delta.dtype)

    def read_counting(
        self,
        site: int,
        norm_weight: Tensor | None = None,
        norm_eps: float | None = None,
        *,
        scale: str = "",
    ) -> Tensor:
        """As :meth:`read`, or the output's site, for readers who count the sources ``n``.

        Args:
            site: Which site, the output's included.
            norm_weight: As for :meth:`read`.
            norm_eps: As for :meth:`read`.
            scale: ``"eps"`` takes ``norm_eps / n²``, ``"mix"`` returns ``n`` times the mix.
        """
        if self.in_graph():
            return self._read_in_graph(norm_weight, norm_eps, scale)
        count = self._residual.num_sources_at(site)
        if scale == "eps":
            norm_eps /= count**2
        hidden = self._take_turn(site, norm_weight, norm_eps)
        return hidden * count if scale == "mix" and count > 1 else hidden

    def _read_in_graph(
        self, norm_weight: Tensor | None, norm_eps: float | None, scale: str = ""
    ) -> Tensor:
        """The next read, as one operator that is the same for every site."""
        self._check_norm(norm_weight)
        hidden, self._cursor = _graph.infer.default(
            self._cursor, self._take_pending(), norm_weight, norm_eps, scale, self._width
        )
        return hidden

    def _take_pending(self) -> Tensor:
        """What was written, for a read in a graph."""
        delta, self._pending = self._pending, None
        if delta is None:
            raise RuntimeError(f"read: nothing was written since the last read. {CHECKPOINTS}")
        self._widen(delta)
        return delta

    def _infer_in_graph(
        self, delta: Tensor, norm_weight: Tensor | None, norm_eps: float | None, scale: str
    ) -> Tensor:
        """What a graph's read without gradients does."""
        self._check_written(delta)
        # A graph reuses the memory of its tensors.
        self._pending = delta.clone()
        with torch.no_grad():
            return self.read_counting(self._site, norm_weight, norm_eps, scale=scale)

    @abstractmethod
    def _read(self, site: int, delta: Tensor, reading: Reading) -> Tensor:
        """The mix at ``site``, with ``delta`` added to the open block before."""

    def _record(self, site: int, sources: list[Tensor], reading: Reading) -> None:
        with torch.no_grad():
            _, weights = ops.depth_attention(
                sources,
                reading["query"],
                reading["key_weight"],
                eps=self._residual.eps,
                return_weights=True,
                save="nothing",
            )
        self._residual._record.add(site, weights)
