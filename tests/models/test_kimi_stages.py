"""Stages of a model: the whole one's results, gradients and checkpoints."""

from functools import reduce

import pytest
import torch
from torch import nn

from attnres_ext.models.kimi_linear import (
    KimiLinearForCausalLM,
    KimiLinearStage,
    load_weights,
    next_token_loss,
    save_weights,
)
from attnres_ext.parallel import first_sites_of, plan_pipeline
from tests.models.test_kimi_modeling import MODES, make_ids, make_model


def stages_of(model, *first_sites):
    block = None if model.config.residual == "standard" else model.residual.sublayers_per_block
    plan = plan_pipeline(
        model.config.num_sublayers, block, (0, *first_sites), (0,) * (len(first_sites) + 1)
    )
    return [KimiLinearStage(model, stage) for stage in plan.stages]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("first_sites", [(4,), (0, 2, 8)], ids=str)
def test_stages_are_the_whole_model(mode, recompute, first_sites):
    model, ids = make_model(mode, queries=0.3), make_ids()
    assert model.config.num_sublayers == 8
    model.model.checkpoint_sublayers = recompute
    whole = model(ids, labels=ids)
    whole.loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    load = [module.load.clone() for module in model.modules() if hasattr(module, "load")]
    model.zero_grad()
    stages = stages_of(model, *first_sites)
    logits = reduce(lambda x, stage: stage(x), stages, ids)
    next_token_loss(logits, ids).backward()
    assert torch.equal(logits, whole.logits)
    found = {name: p.grad for stage in stages for name, p in stage.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12, msg=name)
    again = [m.load for stage in stages for m in stage.modules() if hasattr(m, "load")]
    assert all(torch.equal(a, 2 * b) for a, b in zip(again, load, strict=True))


def test_one_checkpoint_serves_every_split(tmp_path):
    model, ids = make_model("block", queries=0.3), make_ids()
    save_weights(model, tmp_path)
    expected = model(ids).logits
    with torch.device("meta"):
        empty = KimiLinearForCausalLM(model.config).double()
    for first_sites in ((2,), (4, 6)):
        stages = [stage.to_empty(device="cpu") for stage in stages_of(empty, *first_sites)]
        for stage in stages:
            load_weights(stage, tmp_path)
        with torch.no_grad():
            assert torch.equal(reduce(lambda x, stage: stage(x), stages, ids), expected)
    model.model.layers[0].input_layernorm = nn.Identity()
    save_weights(model, tmp_path / "less")
    load_weights(stages[-1], tmp_path / "less")
    with pytest.raises(ValueError, match=r"1 missing: model.layers.0.input_layernorm.weight"):
        load_weights(stages[0], tmp_path / "less")


def test_what_cannot_be_cut_says_so():
    model = make_model("block")
    with pytest.raises(ValueError, match="stage 0 has the sites 0 to 2, expected whole layers"):
        stages_of(model, 3)
    tied = make_model("block", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="tie_word_embeddings is set, expected an embedding and"):
        stages_of(tied, 4)
    assert first_sites_of([4, 4]) == (0, 4)
