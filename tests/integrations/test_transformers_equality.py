"""At zero queries a model with Attention Residuals computes what it computed before; at others,
what the paper says."""

import copy
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("transformers")

from attnres_ext.integrations.transformers import attach, attention_residuals
from tests.integrations import tiny_models
from tests.module.naive_residual import assert_as_exact_as_plain_pytorch, mix


@contextmanager
def computing_in_float64(monkeypatch):
    """What models ask to be done in float32 is done in float64: norms, rotations, softmaxes."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def evaluate(model, ids):
    """Logits, and the gradients of all parameters that have one, by name."""
    model.zero_grad(set_to_none=True)
    logits = model(ids, use_cache=False).logits
    form = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7))
    (logits * form.to(logits.dtype)).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def hold_to_base(name, dtype, settings, monkeypatch):
    base = tiny_models.make(name).to(dtype)
    ids = tiny_models.tokens()
    plain, plain_gradients = evaluate(base, ids)
    with computing_in_float64(monkeypatch):
        exact, exact_gradients = evaluate(copy.deepcopy(base).double(), ids)
    actual, gradients = evaluate(attach(base, **settings), ids)

    assert actual.dtype == plain.dtype
    assert_as_exact_as_plain_pytorch([actual], [plain], [exact])
    names = plain_gradients.keys()
    assert all("attn_res" in n for n in gradients.keys() - names)
    assert_as_exact_as_plain_pytorch(
        *([g[n] for n in names] for g in (gradients, plain_gradients, exact_gradients))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", tiny_models.FITTING)
def test_zero_queries_compute_the_base_model(name, dtype, monkeypatch):
    hold_to_base(name, dtype, {"sublayers_per_block": 2}, monkeypatch)


@pytest.mark.parametrize(
    "settings",
    [{"mode": "full"}, {"sublayers_per_block": 3}, {"sublayers_per_block": 99}, {}],
    ids=str,
)
@pytest.mark.parametrize("two_phase", [True, False])
def test_zero_queries_compute_the_base_model_in_every_mode(settings, two_phase, monkeypatch):
    hold_to_base("llama", torch.float32, settings | {"two_phase": two_phase}, monkeypatch)


def test_epsilon_of_norms_acts_as_on_the_usual_stream(monkeypatch):
    """Embeddings so small that their mean square is the epsilon's own size."""

    def make(name, **changes):
        model = original(name, **changes)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1 and parameter is not model.get_output_embeddings().weight:
                    parameter.mul_(0.05)
        return model

    original = tiny_models.make
    monkeypatch.setattr(tiny_models, "make", make)
    for name in ("llama", "gemma", "gpt2"):
        hold_to_base(name, torch.float32, {"mode": "full"}, monkeypatch)


def paper(model, ids, gains, queries, sublayers_per_block, eps):
    """Logits of a Llama with Attention Residuals, one stack and softmax per site."""
    inner = model.model
    hidden = inner.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rotation = inner.rotary_emb(hidden, position_ids=positions)
    blocks, partial, site = [hidden], None, 0

    def read(norm):
        sources = blocks if partial is None else [*blocks, partial]
        # The norm sees a mean; times its number of sources it is a sum again, as its epsilon wants.
        return norm(mix(sources, queries[site], gains[site], eps) * len(sources))

    for layer in inner.layers:
        for norm, sublayer in (
            (layer.input_layernorm, lambda x, f=layer.self_attn: f(x, rotation)[0]),
            (layer.post_attention_layernorm, layer.mlp),
        ):
            if partial is not None and site % sublayers_per_block == 0:
                blocks, partial = [*blocks, partial], None
            written = sublayer(read(norm))
            partial = written if partial is None else partial + written
            site += 1
    return model.lm_head(read(inner.norm))


@pytest.mark.parametrize("sublayers_per_block", [1, 2, 4])
def test_trained_queries_compute_what_the_paper_says(sublayers_per_block, monkeypatch):
    base = tiny_models.make("llama")
    model = attach(copy.deepcopy(base), sublayers_per_block=sublayers_per_block)
    residual = attention_residuals(model)
    tiny_models.randomise(residual)
    ids = tiny_models.tokens()
    actual, gradients = evaluate(model, ids)

    def naive(model, dtype):
        model = copy.deepcopy(model).to(dtype)
        gains, queries = (
            [p.detach().to(dtype).requires_grad_() for p in parameters]
            for parameters in (residual.key_weights, residual.queries)
        )
        logits = paper(model, ids, gains, queries, sublayers_per_block, residual.eps)
        form = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7))
        (logits * form.to(dtype)).sum().backward()
        found = {n: p.grad for n, p in model.named_parameters()}
        found |= {f"model.attn_res.key_weights.{i}": p.grad for i, p in enumerate(gains)}
        found |= {f"model.attn_res.queries.{i}": p.grad for i, p in enumerate(queries)}
        return logits.detach(), found

    plain, plain_gradients = naive(base, torch.float32)
    with computing_in_float64(monkeypatch):
        exact, exact_gradients = naive(base, torch.float64)
    assert_as_exact_as_plain_pytorch([actual], [plain], [exact])
    names = plain_gradients.keys()
    assert names == gradients.keys()
    assert_as_exact_as_plain_pytorch(
        *([g[n] for n in names] for g in (gradients, plain_gradients, exact_gradients))
    )
