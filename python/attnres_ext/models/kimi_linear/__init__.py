"""Kimi Linear (arXiv 2510.26692) with Attention Residuals (arXiv 2603.15031)."""

from attnres_ext.models.kimi_linear.configuration import (
    KimiLinearConfig,
    LinearAttentionConfig,
    preset_names,
    presets,
)
from attnres_ext.models.kimi_linear.modeling import (
    KimiLinearForCausalLM,
    KimiLinearOutput,
    KimiLinearState,
    next_token_loss,
)
from attnres_ext.models.kimi_linear.stages import KimiLinearStage
from attnres_ext.models.kimi_linear.weights import load_model, load_weights, save_weights

__all__ = [
    "KimiLinearConfig",
    "KimiLinearForCausalLM",
    "KimiLinearOutput",
    "KimiLinearStage",
    "KimiLinearState",
    "LinearAttentionConfig",
    "load_model",
    "load_weights",
    "next_token_loss",
    "preset_names",
    "presets",
    "save_weights",
]
