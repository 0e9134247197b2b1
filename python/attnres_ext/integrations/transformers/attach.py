"""Attention Residuals in a transformers model, in place."""

from __future__ import annotations

from types import MethodType
from typing import Any, TypeVar

from torch import nn
from transformers import AutoModelForCausalLM

from attnres_ext.integrations.transformers import passes
from attnres_ext.integrations.transformers.norms import NormForm, NormRead
from attnres_ext.integrations.transformers.passes import MODULE, FinalRead, LayerRead
from attnres_ext.integrations.transformers.probe import Structure, examine
from attnres_ext.integrations.transformers.weights import (
    HUB_ARGUMENTS,
    Path,
    load_weights,
    without_report,
)
from attnres_ext.residual import AttentionResiduals
from attnres_ext.residual_variants import VARIANTS

__all__ = ["attach", "attention_residuals", "detach", "from_pretrained"]

Model = TypeVar("Model", bound=nn.Module)

#: What a model's configuration says of its Attention Residuals, and their defaults.
SETTINGS: dict[str, Any] = {"mode": "block", "sublayers_per_block": None, "eps": 1e-6}


def attach(
    model: Model,
    *,
    sublayers_per_block: int | None = None,
    mode: str | None = None,
    eps: float | None = None,
    two_phase: str | bool = "auto",
    save: str = "stats",
    weights: Path | None = None,
    **hub: Any,
) -> Model:
    """Puts Attention Residuals in the place of a model's residual stream, in place.

    Every norm that reads the stream now reads a weighted mean of what the sublayers before it
    wrote. Queries start at zero: the model computes what it computed before, up to rounding, and
    goes on training from there. Forward, ``generate``, activation checkpointing,
    ``save_pretrained``, ``Trainer``, PEFT and ``torch.compile`` work as before.

    Which layers, norms and sublayers there are is found by a trial forward over two tokens, not by
    class names. It must be of the pre-norm shape: ``x = x + f(norm(x))`` for one sublayer after the
    other, and a norm at the end. A layer that runs several times reads sites of its own each time.
    Nothing is copied. The model may be on the meta device, if its forward asks for no values; then
    ``attention_residuals(model).reset_parameters()`` when it has memory.

    Args:
        model: A transformers model with a decoder. Its parameters are on one device, and not
            offloaded from it; they may be quantized.
        sublayers_per_block: Size of a block in sublayers, of which a decoder layer usually has two.
            None makes about eight blocks.
        mode: ``"block"`` or ``"full"``.
        eps: Epsilon of the key RMSNorm.
        two_phase: See :class:`attnres_ext.AttentionResiduals`.
        save: See :class:`attnres_ext.AttentionResiduals`.
        weights: Folder, or name on the hub, of a model or an adapter of PEFT that was saved with
            Attention Residuals: theirs are loaded. None starts with fresh ones.
        hub: Arguments of ``from_pretrained`` that say where ``weights`` are: ``cache_dir``,
            ``revision``, ``subfolder``, ``token``, ``local_files_only``, ``force_download``.

    A saved model's configuration keeps ``mode``, ``sublayers_per_block`` and ``eps`` as
    ``attn_res``, and they need not be given again. They default to ``"block"``, None and 1e-6.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: If the model does not fit or already has Attention Residuals, a setting is not
            possible or not the one that the configuration says, ``weights`` are missing or do not
            fit, or an adapter was loaded before that carries some. The model is then as it was.
    """
    if find_attached(model) is not None:
        raise ValueError(
            f"attach: this {type(model).__name__} already has Attention Residuals; detach first"
        )
    modes = [name for name, variant in VARIANTS.items() if variant.attends]
    if mode is not None and mode not in modes:
        raise ValueError(f"attach: mode is {mode!r}, expected one of {', '.join(modes)}")
    if unknown := hub.keys() - set(HUB_ARGUMENTS):
        raise TypeError(f"attach: unexpected argument {', '.join(sorted(unknown))}")
    if reason := _lost_by_adapters(model):
        raise ValueError(f"attach: {reason}")
    structure = examine(model)
    wanted = {"mode": mode, "sublayers_per_block": sublayers_per_block, "eps": eps}
    settings = _settle(wanted, getattr(structure.decoder.config, MODULE, None), weights)
    residual = AttentionResiduals(
        structure.hidden_size,
        structure.num_sublayers,
        **settings,
        two_phase=two_phase,
        save=save,
        device=structure.device,
    )
    if weights is not None:
        load_weights(residual, weights, **hub)
    settings["sublayers_per_block"] = residual.sublayers_per_block
    _install(structure, residual, settings)
    return model


def from_pretrained(
    path: Path,
    *,
    model_class: Any = AutoModelForCausalLM,
    two_phase: str | bool = "auto",
    save: str = "stats",
    **kwargs: Any,
) -> nn.Module:
    """Loads a model that ``save_pretrained`` wrote with Attention Residuals attached.

    Args:
        path: Folder, or name on the hub.
        model_class: The class whose ``from_pretrained`` loads the rest.
        two_phase: See :func:`attach`.
        save: See :func:`attach`.
        kwargs: For ``model_class.from_pretrained``.

    Raises:
        ValueError: If ``path`` holds no Attention Residuals, or not those of its model.
    """
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    with without_report():
        model = model_class.from_pretrained(path, **kwargs)
    return attach(model, two_phase=two_phase, save=save, weights=path, **hub)


def detach(model: Model) -> Model:
    """Gives a model its residual stream back, in place; what attention over depth learnt is lost.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: If it has no Attention Residuals.
    """
    decoder = _decoder_of("detach", model)
    for module in decoder.modules():
        replaced = vars(module).get("forward")
        owner = replaced.__self__ if isinstance(replaced, MethodType) else None
        if isinstance(owner, (LayerRead, NormRead)):
            if owner.previous is None:
                del module.forward
            else:
                module.forward = owner.previous
    for hook in vars(decoder).pop(HOOKS):
        hook.remove()
    delattr(decoder, MODULE)
    if hasattr(decoder.config, MODULE):
        delattr(decoder.config, MODULE)
    return model


def attention_residuals(model: nn.Module) -> AttentionResiduals:
    """The :class:`attnres_ext.AttentionResiduals` of an attached model, for its queries and
    ``recording``.

    Raises:
        ValueError: If it has none.
    """
    return getattr(_decoder_of("attention_residuals", model), MODULE)


#: Attribute of the decoder that holds the handles of its hooks.
HOOKS = "_attn_res_hooks"


def find_attached(model: nn.Module) -> nn.Module | None:
    """The decoder that Attention Residuals are attached to, if any."""
    return next((module for module in model.modules() if HOOKS in vars(module)), None)


def _decoder_of(caller: str, model: nn.Module) -> nn.Module:
    decoder = find_attached(model)
    if decoder is None:
        reason = _lost_by_adapters(model)
        raise ValueError(
            f"{caller}: this {type(model).__name__} has no Attention Residuals"
            + (f"; {reason}" if reason else "")
        )
    return decoder


def _lost_by_adapters(model: nn.Module) -> str | None:
    """What to say of adapters that carry Attention Residuals and found a model without them.

    PEFT loads such an adapter without a word, and leaves out what has no place.
    """
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        if MODULE in (getattr(config, "modules_to_save", None) or ()):
            return (
                f"its adapter {name!r} carries Attention Residuals (modules_to_save), which were "
                "left out where the adapter met a model without them: attach to the base model "
                "first, then load the adapter"
            )
    return None


def _settle(
    wanted: dict[str, Any], configured: dict[str, Any] | None, weights: Path | None
) -> dict[str, Any]:
    """Settings that the configuration says, else those asked for, else the defaults."""
    given = {name: value for name, value in wanted.items() if value is not None}
    if configured is None:
        return {**SETTINGS, **given}
    if weights is None:
        raise ValueError(
            f"attach: the model's configuration has {MODULE}: the model was saved with Attention "
            "Residuals, or shares its configuration with one that has them. Load them with "
            f"weights=PATH, or delete config.{MODULE} to start with fresh ones"
        )
    for name, value in given.items():
        if value != configured.get(name):
            raise ValueError(
                f"attach: {name} is {value!r}, but the model's configuration says "
                f"{configured.get(name)!r}; leave it out"
            )
    if unknown := configured.keys() - SETTINGS.keys():
        raise ValueError(
            f"attach: config.{MODULE} has {', '.join(sorted(unknown))}, "
            f"expected only {', '.join(SETTINGS)}"
        )
    return {**SETTINGS, **configured}


def _install(structure: Structure, residual: AttentionResiduals, settings: dict[str, Any]) -> None:
    decoder = structure.decoder
    # A layer that runs several times reads sites of its own each time.
    sites: dict[nn.Module, list[int]] = {}
    norms: dict[nn.Module, NormForm] = {}
    site = 0
    for run in structure.runs:
        sites.setdefault(run.layer, []).append(site)
        site += len(run.norms)
        norms.update(run.norms)
    for layer, first_sites in sites.items():
        layer.forward = LayerRead(layer, first_sites).forward
    final, form = structure.final_norm
    norms.pop(final, None)
    final.forward = FinalRead(final, form).forward
    for norm, form in norms.items():
        norm.forward = NormRead(norm, form).forward
    hooks = (
        decoder.register_forward_pre_hook(passes.begin, with_kwargs=True),
        decoder.register_forward_hook(passes.end, always_call=True),
    )
    setattr(decoder, HOOKS, hooks)
    setattr(decoder, MODULE, residual)
    setattr(decoder.config, MODULE, settings)
