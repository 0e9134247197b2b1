"""CUDA graphs: captured once, replayed with other values in the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attnres_ext import AttentionResiduals
from attnres_ext.models.kimi_linear import KimiLinearForCausalLM, fla_kernels, presets
from attnres_ext.models.kimi_linear.mla import KimiLatentState
from tests.cuda.calls import CALLS, DIRECTIONS, make_arguments, refill
from tests.helpers import assert_same_bits

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _same_stream() -> Iterator[None]:
    """A capture that fails leaves its stream behind as the current one."""
    before = torch.cuda.current_stream()
    yield
    torch.cuda.set_stream(before)


def capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of the call, and the results that each replay writes anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", CALLS)
def test_replay_with_changed_inputs(name: str, direction: str, rows: int) -> None:
    call = DIRECTIONS[direction](CALLS[name])
    arguments = make_arguments("cuda", rows=rows)
    graph, results = capture(lambda: call(arguments))
    for _ in range(3):
        values = make_arguments("cuda", rows=rows)
        expected = call(values)
        refill(arguments, values)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(results, expected, strict=True):
            assert_same_bits(name, a, b)


@pytest.mark.parametrize("two_phase", [False, True], ids=["single-pass", "two-phase"])
@pytest.mark.parametrize("beside", [False, True], ids=["one-stream", "side-stream"])
@torch.inference_mode()
def test_a_decoding_step(two_phase: bool, beside: bool) -> None:
    """A whole stack of reads and writes on one block cache, as a server replays it."""
    hidden, sublayers = 256, 8
    residual = AttentionResiduals(
        hidden, sublayers, sublayers_per_block=3, two_phase=two_phase, device="cuda"
    )
    for query in residual.queries:
        query.normal_()
    norm = torch.rand(hidden, device="cuda") + 0.5
    cache = residual.new_cache(
        2,
        dtype=torch.bfloat16,
        device="cuda",
        side_stream=torch.cuda.Stream() if beside else None,
        reuse_result=True,
    )
    embedding, delta = (
        torch.empty(2, hidden, dtype=torch.bfloat16, device="cuda") for _ in range(2)
    )

    def step() -> Tensor:
        state = residual.start(embedding, cache)
        for site in range(sublayers):
            torch.tanh(state.read(site, norm), out=delta)
            state.write(delta)
        return state.read_output(norm)

    embedding.normal_()
    step()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph, result = capture(step)
    for _ in range(3):
        embedding.normal_()
        expected = step().clone()
        result.zero_()  # the same memory
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits("hidden", result, expected)


@pytest.mark.parametrize("two_phase", [False, True], ids=["single-pass", "two-phase"])
@torch.inference_mode()
def test_a_model_s_decoding_step(two_phase: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kimi Linear's next token: replayed with another one, and other states of its layers."""
    # Kernels of other people, where they are installed, would be compiled for longer than all this.
    monkeypatch.setattr(fla_kernels, "_kernels", lambda: None)
    config = presets("tiny", residual="block", sublayers_per_block=3)
    config = config.replace(first_k_dense_replace=config.num_hidden_layers)
    model = KimiLinearForCausalLM(config).to("cuda", torch.bfloat16).eval()
    model.residual.two_phase = two_phase
    for query in model.residual.queries:
        query.normal_()
    tokens = torch.randint(config.vocab_size, (2, 9), device="cuda")
    state = model.new_state(2, 9)
    assert state.block_cache._side.stream is not None
    model.prefill(tokens[:, :8], state, 5)
    token = tokens[:, 8:].clone()
    kept = [
        tensor
        for layer in state.layers
        for tensor in vars(layer).values()
        if isinstance(tensor, Tensor)
    ]

    def step() -> Tensor:
        state.length = 8
        for layer in state.layers:
            if isinstance(layer, KimiLatentState):
                layer.length = 8
        return model(token, state=state).logits

    graph, result = capture(step)
    for _ in range(3):
        token.random_(config.vocab_size)
        for tensor in kept:
            tensor.normal_(std=0.1)
        before = [tensor.clone() for tensor in kept]
        expected = step().clone()
        after = [tensor.clone() for tensor in kept]
        for tensor, values in zip(kept, before, strict=True):
            tensor.copy_(values)
        graph.replay()
        torch.cuda.synchronize()
        # Products of another library's kernels: it may choose others under capture.
        torch.testing.assert_close([result, *kept], [expected, *after])
