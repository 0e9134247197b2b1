"""What is done to a model before it trains: recomputation, compilation, sharding."""

from __future__ import annotations

from torch import nn

from attnres_ext.models.kimi_linear.modeling import KimiLinearForCausalLM
from attnres_ext.models.kimi_linear.moe import KimiSparseMoE, has_grouped_products
from attnres_ext.training.distributed import World, shard


def prepare(
    model: KimiLinearForCausalLM, world: World, compile: bool, activation_checkpointing: bool
) -> KimiLinearForCausalLM:
    """Prepares ``model`` in place.

    Args:
        model: On its device, initialised alike in every process.
        world: The processes to shard over.
        compile: Whether sublayers go through ``torch.compile``. The reads between them stay as
            they are: they are single kernels already, and outside of a graph the gradients of
            blocks gather in the kernels' buffers.
        activation_checkpointing: Whether sublayers are computed again in the backward.

    Returns:
        The model.
    """
    model.model.checkpoint_sublayers = activation_checkpointing
    if compile:
        for layer in model.model.layers:
            for sublayer in (layer.self_attn, layer.feed_forward):
                for part in _compilable(sublayer, world.device):
                    part.compile()
    if world.shares > 1:
        shard(model, world)
    return model


def _compilable(sublayer: nn.Module, device: str) -> list[nn.Module]:
    """The sublayer, or the parts of it whose shapes do not depend on where tokens are sent."""
    if not isinstance(sublayer, KimiSparseMoE) or has_grouped_products(device):
        return [sublayer]
    return [part for part in (sublayer.gate, sublayer.shared_experts) if part is not None]
