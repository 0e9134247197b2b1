"""Stretches of a model's layers, for pipelines."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from attnres_ext.models.kimi_linear.modeling import (
    KimiLinearForCausalLM,
    embed,
    update_router_bias,
)
from attnres_ext.suspended import SuspendedPass

if TYPE_CHECKING:
    from attnres_ext.parallel import StagePlan

__all__ = ["KimiLinearStage"]


class KimiLinearStage(nn.Module):
    """The layers of a model whose sites a stage has: a module for
    :func:`attnres_ext.parallel.pipeline.pipeline_stages`.

    Parameters are the model's own, under their names there: one checkpoint serves every split
    (``load_weights`` fills a stage, too). The embedding belongs to the first stage, the last norm
    and the head to the last.

    Args:
        model: The whole model; on the meta device it takes no memory, and ``to_empty`` gives a
            stage its own.
        stage: Which sites.

    Raises:
        ValueError: If a layer would be cut in two, or the embedding is also the head's.

    Attributes:
        config: The model's.
    """

    def __init__(self, model: KimiLinearForCausalLM, stage: StagePlan) -> None:
        super().__init__()
        self.config, whole = model.config, model.model
        last = stage.end_site == self.config.num_sublayers + 1
        end = stage.end_site - last
        if stage.first_site % 2 or end % 2:
            raise ValueError(
                f"KimiLinearStage: stage {stage.index} has the sites {stage.first_site} to "
                f"{stage.end_site - 1}, expected whole layers, two sites each"
            )
        if self.config.tie_word_embeddings:
            raise ValueError(
                "KimiLinearStage: tie_word_embeddings is set, expected an embedding and a head of "
                "their own: they are in different stages"
            )
        part = nn.Module()
        if stage.index == 0:
            part.embed_tokens = whole.embed_tokens
        part.layers = nn.ModuleDict(
            {str(i): whole.layers[i] for i in range(stage.first_site // 2, end // 2)}
        )
        # The lists are copied, the parameters in them are not.
        shared = {id(parameter): parameter for parameter in whole.residual.parameters()}
        part.residual = copy.deepcopy(whole.residual, shared)
        part.residual.keep_sites(stage.sites)
        if last:
            part.norm = whole.norm
        self.model = part
        if last:
            self.lm_head = model.lm_head
        self.checkpoint_sublayers = whole.checkpoint_sublayers

    def reset_parameters(self) -> None:
        """As of the model, for what the stage has of it."""
        part = self.model
        if hasattr(part, "embed_tokens"):
            nn.init.normal_(part.embed_tokens.weight, std=self.config.initializer_range)
        ends = (part.norm, self.lm_head) if hasattr(self, "lm_head") else ()
        for each in (*part.layers.values(), part.residual, *ends):
            each.reset_parameters()

    def forward(self, x: Tensor | SuspendedPass) -> SuspendedPass | Tensor:
        """From token ids ``[B, T]`` or the stage before, to the next stage or logits
        ``[B, T, vocab_size]``."""
        part = self.model
        if isinstance(x, SuspendedPass):
            state = part.residual.resume(x)
        else:
            state = part.residual.start(embed(part.embed_tokens, x))
        recompute = self.checkpoint_sublayers and torch.is_grad_enabled()
        hidden = state.pending
        for layer in part.layers.values():
            hidden = layer(hidden, state, recompute=recompute)
        state.pass_on(hidden)
        if not hasattr(self, "lm_head"):
            return state.suspend()
        return self.lm_head(state.read_output(part.norm.weight, part.norm.eps))

    update_router_bias = update_router_bias
