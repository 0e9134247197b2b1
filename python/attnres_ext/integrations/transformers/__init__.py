"""Attention Residuals in a model of the transformers library, in three lines.

::

    from transformers import AutoModelForCausalLM
    from attnres_ext.integrations.transformers import attach

    model = attach(AutoModelForCausalLM.from_pretrained(name), sublayers_per_block=8)
"""

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "attnres_ext.integrations.transformers needs the transformers library: "
        "pip install 'attnres-ext[transformers]'",
        name=error.name,
    ) from error

from attnres_ext.integrations.transformers.attach import (
    attach,
    attention_residuals,
    detach,
    from_pretrained,
)

__all__ = ["attach", "attention_residuals", "detach", "from_pretrained"]
