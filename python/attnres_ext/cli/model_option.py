"""The option ``--model``: a preset of Kimi Linear, or a ``config.json``."""

from __future__ import annotations

from pathlib import Path

from attnres_ext.models.kimi_linear import KimiLinearConfig, preset_names, presets
from attnres_ext.residual_variants import VARIANTS
from attnres_ext.training.errors import UserError


def read_config(model: str, residual: str | None) -> KimiLinearConfig:
    """The configuration that ``--model`` names.

    Args:
        model: A preset's name, or the path of a ``config.json``.
        residual: Residual mode in place of the model's own; None leaves it.

    Raises:
        UserError: There is no such model, or it cannot work.
    """
    path = Path(model)
    try:
        known = model in preset_names() and not path.is_file()
        config = presets(model) if known else KimiLinearConfig.from_json(path)
        if residual and VARIANTS[residual].sized and config.sublayers_per_block is None:
            raise ValueError(f"it has no sublayers_per_block, which --residual {residual} needs")
        return config.replace(residual=residual or config.residual)
    except OSError as error:
        raise UserError(
            f"--model {model} is no preset ({', '.join(preset_names())}) and cannot be read: "
            f"{error.strerror}"
        ) from error
    except (ValueError, TypeError) as error:
        raise UserError(f"--model {model}: {error}") from error
