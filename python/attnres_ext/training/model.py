"""Which model a run trains, and what its sites and sources are called in plots."""

from __future__ import annotations

from attnres_ext.models.kimi_linear.configuration import KimiLinearConfig, presets
from attnres_ext.residual import AttentionResiduals
from attnres_ext.residual_variants import Block
from attnres_ext.training.errors import UserError
from attnres_ext.training.settings import Settings


def make_config(settings: Settings, vocab_size: int) -> KimiLinearConfig:
    """The configuration that all arms share; each sets its own ``residual``.

    Args:
        settings: The run's. Without ``sublayers_per_block`` the configuration's own is kept, or
            makes about eight blocks where it has none.
        vocab_size: The tokenizer's.

    Raises:
        UserError: No such file, or a configuration that cannot work.
    """
    path = settings.config
    try:
        model = KimiLinearConfig.from_json(path) if path else presets(settings.preset)
        about = max(2, Block.of(model.num_sublayers, None).sublayers_per_block)
        model = model.replace(
            vocab_size=vocab_size,
            residual="block",
            sublayers_per_block=settings.sublayers_per_block or model.sublayers_per_block or about,
        )
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        option = f"--config {path}" if path else f"--preset {settings.preset}"
        raise UserError(f"{option}: {error}") from error
    if settings.sequence_length > model.model_max_length:
        raise UserError(
            f"--sequence-length {settings.sequence_length} is more than the model takes: "
            f"model_max_length is {model.model_max_length}"
        )
    return model


def site_names(config: KimiLinearConfig) -> list[str]:
    """Names of a model's sites by what they feed: "1 kda", "1 mlp", ..., "8 moe", "output"."""
    names = []
    for layer in range(config.num_hidden_layers):
        names.append(f"{layer + 1} {'kda' if config.is_kda_layer(layer) else 'mla'}")
        names.append(f"{layer + 1} {'moe' if config.is_moe_layer(layer) else 'mlp'}")
    return [*names, "output"]


def source_names(config: KimiLinearConfig, residual: AttentionResiduals) -> list[list[str]]:
    """Names of what each site attends over.

    These are those of :meth:`AttentionResiduals.sources_at`; a block of one sublayer goes by that
    sublayer's name.
    """
    names = [residual.sources_at(site) for site in range(residual.num_sites)]
    if residual.sublayers_per_block > 1:
        return names
    sublayers = {f"block {i + 1}": name for i, name in enumerate(site_names(config))}
    return [[sublayers.get(source, source) for source in sources] for sources in names]
