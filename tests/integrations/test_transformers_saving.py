"""A saved model comes back with its Attention Residuals, or with a sentence that says why not."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, LlamaForCausalLM

from attnres_ext.integrations.transformers import attach, attention_residuals, from_pretrained
from attnres_ext.integrations.transformers.weights import without_report
from tests.integrations import tiny_models


def attached(name="llama", **settings):
    model = attach(tiny_models.make(name), **({"sublayers_per_block": 3} | settings))
    tiny_models.randomise(attention_residuals(model))
    return model


def same_logits(a, b):
    ids = tiny_models.tokens()
    with torch.no_grad():
        a, b = (model.eval()(ids).logits for model in (a, b))
    # Experts may be multiplied another way after loading.
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_save_and_load(name, shard, tmp_path):
    model = attached(name)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert same_logits(loaded, model)
    residual = attention_residuals(loaded)
    assert (residual.mode, residual.sublayers_per_block, residual.eps) == ("block", 3, 1e-6)
    # The same by hand.
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not same_logits(plain, model)
    assert same_logits(attach(plain, weights=tmp_path), model)


def test_settings_and_dtypes_travel(tmp_path):
    model = attached(mode="full", sublayers_per_block=None, eps=1e-5).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(
        tmp_path, model_class=LlamaForCausalLM, dtype=torch.bfloat16, save="nothing"
    )
    residual = attention_residuals(loaded)
    assert (residual.mode, residual.eps, residual.save) == ("full", 1e-5, "nothing")
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[n]) for n, tensor in loaded.state_dict().items())


def test_the_load_report_is_about_other_parameters(tmp_path):
    attached().save_pretrained(tmp_path)
    reports = []
    logger = logging.getLogger("transformers.modeling_utils")
    handler = logging.Handler()
    handler.emit = lambda record: reports.append(record.getMessage())
    logger.addHandler(handler)
    try:
        from_pretrained(tmp_path)
        assert not reports
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["model.surplus"] = torch.zeros(1)
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        from_pretrained(tmp_path)
        assert "model.surplus" in reports[0]
        # As transformers said it before version 5.
        old = "Weights of PATH were not used when initializing Llama: ['model.attn_res.queries.0'"
        reports.clear()
        with without_report():
            logger.warning(f"{old}]")
            assert not reports
            logger.warning(f"{old}, 'model.surplus']")
        assert len(reports) == 1
    finally:
        logger.removeHandler(handler)
    assert not logger.filters


def test_the_body_alone_loads_from_the_whole(tmp_path):
    from transformers import AutoModel

    model = attached()
    model.save_pretrained(tmp_path)
    body = from_pretrained(tmp_path, model_class=AutoModel)
    ids = tiny_models.tokens()
    with torch.no_grad():
        expected = model.model(ids).last_hidden_state
        tiny_models.assert_same(body(ids).last_hidden_state, expected)


def test_attaching_to_a_saved_model_asks_for_its_weights(tmp_path):
    attached().save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"Load them with weights=PATH, or delete config\.attn_res"
    ):
        attach(plain)
    with pytest.raises(ValueError, match="mode is 'full', but the model's configuration says 'bl"):
        attach(plain, mode="full", weights=tmp_path)
    del plain.config.attn_res
    assert not any(query.any() for query in attention_residuals(attach(plain)).queries)


def test_weights_that_do_not_fit_are_named_together_and_nothing_is_loaded(tmp_path):
    attached().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.attn_res.queries.2"]
    tensors["model.attn_res.queries.9"] = torch.zeros(32)
    tensors["model.attn_res.key_weights.1"] = torch.zeros(31)
    save_file(tensors, file, {"format": "pt"})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"key_weights\.1 has shape \(31,\), expected \(32,\); queries\.2 is missing; "
        r"queries\.9 is unexpected",
    ):
        attach(plain, weights=tmp_path)
    assert not hasattr(plain.model, "attn_res")

    tiny_models.make("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="base holds no parameters of Attention Residuals"):
        from_pretrained(tmp_path / "base")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has neither model\.safetensors nor"):
        attach(plain, weights=tmp_path / "empty")


def test_a_configuration_from_elsewhere_is_refused(tmp_path):
    attached().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["attn_res"]["heads"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.attn_res has heads, expected only mode, sub"):
        from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="unexpected argument sublayer_per_block"):
        attach(tiny_models.make("llama"), sublayer_per_block=3)
