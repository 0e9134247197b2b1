"""A stack of layers whose residual can be exchanged, and the calls that are timed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from attnres_ext import AttentionResiduals
from attnres_ext.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from attnres_ext.models.kimi_linear.configuration import LinearAttentionConfig
from attnres_ext.models.kimi_linear.mla import KimiLatentState
from attnres_ext.models.kimi_linear.modeling import KimiDecoderLayer, KimiLinearState
from attnres_ext.residual_state import ResidualState

from .model_registry import ModelCase
from .model_variants import VARIANTS, Variant
from .timing import Action

#: A small vocabulary: the head of a short stack would otherwise be most of the work.
_VOCABULARY = 1024


def configuration(case: ModelCase) -> KimiLinearConfig:
    """The case's model."""
    full = [layer for layer in range(1, case.layers + 1) if layer % 4 == 0]
    return KimiLinearConfig(
        vocab_size=_VOCABULARY,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        kv_lora_rank=4 * case.head_dim,
        qk_nope_head_dim=case.head_dim,
        qk_rope_head_dim=case.head_dim // 2,
        v_head_dim=case.head_dim,
        linear_attn_config=LinearAttentionConfig(
            kda_layers=[layer for layer in range(1, case.layers + 1) if layer not in full],
            full_attn_layers=full,
            num_heads=case.heads,
            head_dim=case.head_dim,
            short_conv_kernel_size=4,
            chunk_size=64,
        ),
        model_max_length=case.context + case.tokens + 1,
    )


@dataclass
class Stack:
    """One set of layers for all variants: what differs between them is what connects the layers.

    Attributes:
        case: what it does.
        model: the layers; whose residual it has at the moment is the last variant's business.
        residuals: modules to connect them with, by the variant's name.
        tokens: ids ``[B, context + tokens]``.
        written: what stands in for sublayers where reads alone are timed.
    """

    case: ModelCase
    model: KimiLinearForCausalLM
    residuals: nn.ModuleDict
    tokens: Tensor
    written: dict[tuple[int, torch.Size, torch.dtype], Tensor] = field(default_factory=dict)

    @contextlib.contextmanager
    def connected_by(self, variant: Variant) -> Iterator[KimiLinearForCausalLM]:
        """The model with the variant's residual; where reads alone are timed, without sublayers."""
        inner = self.model.model
        before = inner.residual
        inner.residual = self.residuals[variant.name]
        if self.case.work == "reads":
            for layer in inner.layers:
                layer.forward = partial(self._read_alone, layer)
        try:
            yield self.model
        finally:
            inner.residual = before
            for layer in inner.layers:
                vars(layer).pop("forward", None)

    def _read_alone(
        self, layer: KimiDecoderLayer, x: Tensor, residual: ResidualState, *_: object
    ) -> Tensor:
        """A layer's reads; in the place of each sublayer is a tensor that it always writes."""
        residual.pass_on(x)
        for site, norm in (
            (layer.attention_site, layer.input_layernorm),
            (layer.feed_forward_site, layer.post_attention_layernorm),
        ):
            residual.write(self._written(site, residual.read(site, norm.weight, norm.eps)))
        return residual.pending

    def _written(self, site: int, hidden: Tensor) -> Tensor:
        key = site, hidden.shape, hidden.dtype
        if key not in self.written:
            generator = torch.Generator(hidden.device).manual_seed(site)
            values = torch.randn(hidden.shape, generator=generator, device=hidden.device)
            # The same in float64 as in the case's dtype.
            self.written[key] = values.to(getattr(torch, self.case.dtype)).to(hidden.dtype)
        return self.written[key]

    def parameters(self) -> list[nn.Parameter]:
        """Of the layers and of every variant's residual, each once."""
        return list(dict.fromkeys([*self.model.parameters(), *self.residuals.parameters()]))


def make_stack(case: ModelCase, device: str, variants: tuple[Variant, ...] = VARIANTS) -> Stack:
    """Random layers, and pseudo-queries of a size that makes a difference."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    with torch.device(device):
        model = KimiLinearForCausalLM(configuration(case)).to(dtype)
        shared = {mode: _residual(case, mode, device) for mode in ("standard", "block", "full")}
        tokens = torch.randint(0, _VOCABULARY, (case.batch, case.context + case.tokens))
    residuals = nn.ModuleDict({one.name: one.make(shared[one.residual]) for one in variants})
    return Stack(case, model, residuals, tokens)


def _residual(case: ModelCase, mode: str, device: str) -> AttentionResiduals:
    residual = AttentionResiduals(
        case.hidden,
        2 * case.layers,
        mode=mode,
        sublayers_per_block=case.sublayers_per_block if mode == "block" else None,
        eps=configuration(case).rms_norm_eps,
        device=device,
    )
    for query in residual.queries:
        nn.init.normal_(query, std=case.hidden**-0.5)
    return residual


def action(stack: Stack, variant: Variant, optimizer: torch.optim.Optimizer | None) -> Action:
    """What one timed call of a variant does.

    Args:
        stack: the layers.
        variant: what connects them.
        optimizer: of all parameters, for training.
    """
    makers: dict[str, Callable[[], Action]] = {
        "train": lambda: _training_step(stack, variant, optimizer),
        "prefill": lambda: _prefill(stack, variant),
        "decode": lambda: _decoding_step(stack, variant),
        "reads": lambda: _reads(stack, variant),
    }
    return makers[stack.case.work]()


def _training_step(stack: Stack, variant: Variant, optimizer: torch.optim.Optimizer) -> Action:
    def run(_: int) -> None:
        with stack.connected_by(variant) as model:
            model(stack.tokens, labels=stack.tokens).loss.backward()
        # Parameters of other variants have no gradient, and are left alone.
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Action(run)


def _prefill(stack: Stack, variant: Variant) -> Action:
    case = stack.case

    def run(_: int) -> Tensor:
        with stack.connected_by(variant) as model:
            state = model.new_state(case.batch, case.tokens)
            return model(stack.tokens, state=state, logits_to_keep=1).logits

    return Action(run, context=torch.inference_mode)


def _decoding_step(stack: Stack, variant: Variant) -> Action:
    case = stack.case
    with torch.inference_mode(), stack.connected_by(variant) as model:
        state = model.new_state(case.batch, case.context + 1)
        model(stack.tokens[:, :-1], state=state, logits_to_keep=1)
    token = stack.tokens[:, -1:]

    def run(_: int) -> Tensor:
        with stack.connected_by(variant) as model:
            return model(token, state=state).logits

    return Action(run, before=lambda _: _rewind(state, case.context), context=torch.inference_mode)


def _reads(stack: Stack, variant: Variant) -> Action:
    case = stack.case
    with torch.inference_mode(), stack.connected_by(variant) as model:
        state = model.new_state(case.batch, case.context + 1)
    token = stack.tokens[:, -1:]

    def run(_: int) -> Tensor:
        with stack.connected_by(variant) as model:
            return model.model(token, state)

    return Action(run, context=torch.inference_mode)


def _rewind(state: KimiLinearState, length: int) -> None:
    """Makes the state accept the same position again; what it holds of it is written over."""
    state.length = length
    for layer in state.layers:
        if isinstance(layer, KimiLatentState):
            layer.length = length
