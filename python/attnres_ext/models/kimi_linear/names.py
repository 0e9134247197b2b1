"""What parameters are called in checkpoints: the one table.

Everything but the residual's parameters and the experts' is named in the model as in
Kimi-Linear-48B-A3B's checkpoint. Experts are stacked in the model and apart in checkpoints. The
parameters of Attention Residuals have four spellings out there; all of them are read, any of them
can be written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import NamedTuple

from attnres_ext.models.kimi_linear.configuration import KimiLinearConfig
from attnres_ext.residual_variants import VARIANTS

__all__ = ["RESIDUAL_SPELLINGS", "checkpoint_names", "spelling_of", "stored_names"]


class _Site(NamedTuple):
    """Names in a checkpoint of what a site reads with.

    Attributes:
        query: Of the pseudo-query ``[1, D]``.
        gain: Of the gain of its keys ``[D]``.
        norm: Of the gain of the norm that follows, where that is not spelt as in the model.
    """

    query: str
    gain: str
    norm: str | None = None


def _beside(attention: str, feed_forward: str, output: str) -> Callable[[int], list[_Site]]:
    """A site's parameters lie beside its sublayer's norm."""

    def sites(num_layers: int) -> list[_Site]:
        stems = [
            f"model.layers.{index}.{stem}"
            for index in range(num_layers)
            for stem in (attention, feed_forward)
        ]
        return [
            _Site(f"{stem}_proj.weight", f"{stem}_norm.weight")
            for stem in (*stems, f"model.{output}")
        ]

    return sites


def _behind(num_layers: int) -> list[_Site]:
    """A sublayer has a module that reads for the next one; the first one's reads for itself,
    too."""
    modules = [
        f"model.layers.{index}.residual_{kind}"
        for index in range(num_layers)
        for kind in ("attn", "mlp")
    ]
    stems = [f"{modules[0]}.input_", *(f"{module}." for module in modules)]
    return [_Site(*(f"{s}{n}.weight" for n in ("query", "key_norm", "norm"))) for s in stems]


# Who spells so -> the names of all sites of so many layers.
RESIDUAL_SPELLINGS = {
    "k3": _beside("self_attention_res", "mlp_res", "output_attn_res"),  # Kimi K3's checkpoint
    "fla": _beside("attn_res", "mlp_res", "res"),  # flash-linear-attention, models
    "fla_residuals": _behind,  # flash-linear-attention, modules.residuals.AttentionResidual
    "torchtitan": _beside("attention_res", "ffn_res", "output_res"),
}
_EXPERTS = re.compile(r"(.*\.experts)\.(w[123])")


def checkpoint_names(config: KimiLinearConfig, spelling: str = "k3") -> dict[str, str]:
    """Module name -> checkpoint's name of what is spelt in several ways.

    These are the parameters of Attention Residuals, and where those bring the norms along, their
    gains. Site ``2 i`` is read before layer ``i``'s attention, site ``2 i + 1`` before its
    feed-forward network, the last one before the output. Queries are stored as ``[1, D]``, the
    weight of a projection to one logit; key gains as ``[D]``. Layer 0's attention site has a single
    source, hence no effect; its parameters are stored all the same.

    Args:
        config: The model's.
        spelling: A key of :data:`RESIDUAL_SPELLINGS`.

    Raises:
        ValueError: There is no such spelling.
    """
    if spelling not in RESIDUAL_SPELLINGS:
        raise ValueError(
            f"residual names are spelt {spelling!r}; they can be spelt "
            f"{', '.join(RESIDUAL_SPELLINGS)}"
        )
    norms = [
        f"model.layers.{index}.{norm}.weight"
        for index in range(config.num_hidden_layers)
        for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    norms.append("model.norm.weight")
    sites = RESIDUAL_SPELLINGS[spelling](config.num_hidden_layers)
    names = {}
    for number, (norm, site) in enumerate(zip(norms, sites, strict=True)):
        if VARIANTS[config.residual].attends:
            names[f"model.residual.queries.{number}"] = site.query
            names[f"model.residual.key_weights.{number}"] = site.gain
        if site.norm is not None:
            names[norm] = site.norm
    return names


def spelling_of(names: Collection[str]) -> str:
    """How the residual's parameters are spelt among a checkpoint's ``names``; "k3" without any."""
    for spelling, sites in RESIDUAL_SPELLINGS.items():
        last = sites(1)[-1]
        if last.query in names or last.norm in names:
            return spelling
    return "k3"


def stored_names(name: str, count: int) -> list[str]:
    """Names in a checkpoint of what the model calls ``name``: one, or one per expert.

    Args:
        name: The model's name.
        count: Size of its first dimension, which is that of the experts where they are stacked.
    """
    match = _EXPERTS.fullmatch(name)
    if not match:
        return [name]
    return [f"{match[1]}.{expert}.{match[2]}.weight" for expert in range(count)]
