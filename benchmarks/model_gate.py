"""Whether a variant computes the model: its hidden states and gradients against float64.

As in :mod:`attnres_ext.benchmarks.gate`, a variant may be twice as far from float64 as plain
PyTorch in the model's own dtype, plus a rounding. Inference goes through a decoding state, as the
calls that are timed do. A stack amplifies roundings layer by layer, so errors are root mean squares
over tokens: a single entry is a matter of luck.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor

from attnres_ext.models.kimi_linear import KimiLinearForCausalLM

from .gate import Verdict, first_line
from .model_stack import Stack
from .model_variants import VARIANTS, Variant

#: Tokens that are compared; the definition in float64 takes longer than everything else together.
_TOKENS = 48
#: So many of them come one by one where decoding is timed, and they alone are compared.
_DECODED = 8


class ModelGate:
    """The expected results of a stack, with each kind of residual."""

    def __init__(self, stack: Stack):
        """Prepares a narrow and a float64 copy of few tokens' work."""
        self._stack = replace(stack, tokens=stack.tokens[:1, :_TOKENS])
        self._wide = copy.deepcopy(self._stack)
        self._wide.model.double()
        self._wide.residuals.double()
        self._known: dict[str, tuple[dict[str, Tensor], dict[str, float]]] = {}

    def check(self, variant: Variant) -> Verdict:
        """Runs a variant once and judges it."""
        try:
            exact, plain_error = self._expected(variant.residual)
            actual = _results(self._stack, variant)
        except Exception as error:  # whatever a baseline throws, the others go on
            return Verdict(False, f"{type(error).__name__}: {first_line(error)}", failed=True)
        worst = 0.0
        for name, expected in exact.items():
            rounding = torch.finfo(actual[name].dtype).eps * _size(expected)
            allowed = 2 * plain_error[name] + rounding
            error = _size(actual[name].double() - expected)
            # Written so that a NaN is refused.
            if not error <= allowed:
                return Verdict(False, f"{name} is off by {error:.2e}, allowed are {allowed:.2e}")
            worst = max(worst, error / allowed if allowed else 0.0)
        return Verdict(True, worst=worst)

    def _expected(self, residual: str) -> tuple[dict[str, Tensor], dict[str, float]]:
        if residual not in self._known:
            eager = next(a for a in VARIANTS if (a.residual, a.baseline) == (residual, "eager"))
            exact = _results(self._wide, eager)
            plain = _results(self._stack, eager)
            errors = {name: _size(plain[name].double() - exact[name]) for name in exact}
            self._known[residual] = exact, errors
        return self._known[residual]


def _results(stack: Stack, variant: Variant) -> dict[str, Tensor]:
    """Hidden states, and for training the gradient of the embedding, which all sites reach."""
    with stack.connected_by(variant) as model:
        if stack.case.work != "train":
            with torch.inference_mode():
                return {"hidden states": _inferred(stack, model)}
        hidden = model.model(stack.tokens)
        form = torch.linspace(-1, 1, hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
        (gradient,) = torch.autograd.grad((hidden * form).sum(), model.model.embed_tokens.weight)
    return {"hidden states": hidden.detach(), "gradient of the embedding": gradient}


def _inferred(stack: Stack, model: KimiLinearForCausalLM) -> Tensor:
    batch, length = stack.tokens.shape
    state = model.new_state(batch, length)
    if stack.case.work == "prefill":
        return model.model(stack.tokens, state)
    known = max(1, length - _DECODED)
    model.model(stack.tokens[:, :known], state)
    # Every step has its hidden states in the memory of the one before.
    steps = stack.tokens[:, known:].split(1, dim=1)
    return torch.cat([model.model(token, state).clone() for token in steps], dim=1)


def _size(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else math.nan
