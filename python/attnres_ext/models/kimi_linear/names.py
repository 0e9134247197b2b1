"""What parameters are called in checkpoints: the one table.

Everything but the residual's parameters and the experts' is named in the model as in
Kimi-Linear-48B-A3B's checkpoint. Experts are stacked in the model and apart in checkpoints. The
parameters of Attention Residuals have three spellings out there; all of them are read, any of them
can be written.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from attnres_ext.models.kimi_linear.configuration import KimiLinearConfig

__all__ = ["RESIDUAL_SPELLINGS", "checkpoint_names", "spelling_of", "stored_names"]

# Who spells so -> what the sites before attention, before feed-forward, and of the output are
# called; "_norm.weight" follows for the key gain [D], "_proj.weight" for the pseudo-query [1, D].
RESIDUAL_SPELLINGS = {
    "k3": ("self_attention_res", "mlp_res", "output_attn_res"),  # Kimi K3's checkpoint
    "fla": ("attn_res", "mlp_res", "res"),  # flash-linear-attention
    "torchtitan": ("attention_res", "ffn_res", "output_res"),
}
_EXPERTS = re.compile(r"(.*\.experts)\.(w[123])")


def checkpoint_names(config: KimiLinearConfig, spelling: str = "k3") -> dict[str, str]:
    """Module name -> checkpoint's name of each Attention Residuals parameter.

    Site ``2 i`` is read before layer ``i``'s attention, site ``2 i + 1`` before its feed-forward
    network, the last one before the output. Queries are stored as ``[1, D]``, the weight of a
    projection to one logit; key gains as ``[D]``. Layer 0's attention site has a single source,
    hence no effect; its parameters are stored all the same.

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
    if config.residual == "standard":
        return {}
    *in_layer, output = RESIDUAL_SPELLINGS[spelling]
    sites = [
        f"model.layers.{index}.{site}"
        for index in range(config.num_hidden_layers)
        for site in in_layer
    ]
    sites.append(f"model.{output}")
    return {
        f"model.residual.{ours}.{number}": f"{site}_{theirs}.weight"
        for number, site in enumerate(sites)
        for ours, theirs in (("queries", "proj"), ("key_weights", "norm"))
    }


def spelling_of(names: Collection[str]) -> str:
    """How the residual's parameters are spelt among a checkpoint's ``names``; "k3" without any."""
    for spelling, (*_, output) in RESIDUAL_SPELLINGS.items():
        if f"model.{output}_proj.weight" in names:
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
