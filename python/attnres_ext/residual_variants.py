"""What sets one way of connecting sublayers over depth apart from another.

Another one is a class here, and an entry in :data:`VARIANTS`; its name is that of
``AttentionResiduals(mode=...)``, of ``config.json`` and of the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

__all__ = ["VARIANTS", "Block", "Full", "Standard"]

# About eight blocks recover most of what full depth attention gives (paper, section 3.2 and Fig.
# 6).
DEFAULT_NUM_BLOCKS = 8


@dataclass(frozen=True)
class Block:
    """Sums over blocks of sublayers, and attention over these sums (paper, section 3.2).

    :class:`attnres_ext.AttentionResiduals` has the same methods and says what they mean.

    Attributes:
        num_sublayers: How many sublayers write.
        sublayers_per_block: Size of a block.
        attends: Whether sites read with a pseudo-query and a gain for their keys.
        sized: Whether the size of a block is the user's choice.
    """

    num_sublayers: int
    sublayers_per_block: int

    attends: ClassVar[bool] = True
    sized: ClassVar[bool] = True

    @classmethod
    def of(cls, num_sublayers: int, sublayers_per_block: int | None) -> Block:
        """The variant in a model; ``sublayers_per_block`` is the user's choice, or None."""
        return cls(num_sublayers, sublayers_per_block or -(-num_sublayers // DEFAULT_NUM_BLOCKS))

    @property
    def num_blocks(self) -> int:
        """How many blocks the sublayers form."""
        return self.num_blocks_before(self.num_sublayers)

    def closes_block(self, site: int) -> bool:
        """Whether the sum that ``site`` reads last is finished."""
        return site % self.sublayers_per_block == 0

    def num_blocks_before(self, site: int) -> int:
        """How many blocks are finished before ``site``, with the embedding."""
        return -(-site // self.sublayers_per_block)

    def sites_of_block(self, block: int) -> range:
        """The sites that read ``block`` while it is open or just finished."""
        first = (block - 1) * self.sublayers_per_block + 1
        return range(first, min(first + self.sublayers_per_block, self.num_sublayers + 1))

    def sources_at(self, site: int) -> list[str]:
        """Names of what ``site`` attends over."""
        if site == 0:
            return ["embedding"]
        last = self.num_blocks_before(site)
        finished = self.closes_block(site) or site == self.num_sublayers
        return [
            "embedding",
            *(f"block {block}" for block in range(1, last)),
            f"block {last}" if finished else "partial",
        ]

    def num_sources_at(self, site: int) -> int:
        """``len(sources_at(site))``."""
        return 1 + self.num_blocks_before(site)


class Full(Block):
    """Attention over every sublayer's output: a block is one sublayer (paper, section 3.1)."""

    sized = False

    @classmethod
    def of(cls, num_sublayers: int, sublayers_per_block: int | None) -> Full:
        """As of :class:`Block`."""
        return cls(num_sublayers, 1)


class Standard(Block):
    """The usual sum, never closed: one source, whose weight is 1 whatever the query."""

    attends = sized = False

    @classmethod
    def of(cls, num_sublayers: int, sublayers_per_block: int | None) -> Standard:
        """As of :class:`Block`."""
        return cls(num_sublayers, num_sublayers)

    def closes_block(self, site: int) -> bool:
        """Never."""
        return False

    def num_blocks_before(self, site: int) -> int:
        """None is."""
        return 0

    def sources_at(self, site: int) -> list[str]:
        """The sum."""
        return ["sum"]


#: Every variant by its name.
VARIANTS: dict[str, type[Block]] = {"standard": Standard, "block": Block, "full": Full}
#: Their names.
MODES = tuple(VARIANTS)
