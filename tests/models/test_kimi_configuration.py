"""Configurations: presets, public files, and sentences for mistakes."""

import copy
import json
import re

import pytest
import torch

from attnres_ext.models.kimi_linear import (
    KimiLinearConfig,
    KimiLinearForCausalLM,
    preset_names,
    presets,
)


def test_presets_are_valid_and_round_trip(tmp_path):
    assert preset_names() == ("tiny", "demo", "small", "48b")
    for name in preset_names():
        config = presets(name)
        assert KimiLinearConfig.from_dict(config.to_dict()) == config
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
        assert KimiLinearConfig.from_json(tmp_path) == config
        assert KimiLinearConfig.from_json(tmp_path / "config.json") == config
        for mode in ("standard", "full"):
            assert presets(name, residual=mode).residual == mode


def test_three_kda_layers_to_one_of_full_attention():
    for name in ("tiny", "demo", "small"):
        config = presets(name)
        for index in range(config.num_hidden_layers):
            assert config.is_kda_layer(index) == ((index + 1) % 4 != 0)


def test_the_48b_preset_is_a_model_of_48_billion_parameters():
    with torch.device("meta"):
        model = KimiLinearForCausalLM(presets("48b"))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert abs(total / 48e9 - 1) < 0.03
    config = model.config
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = (config.num_experts - config.num_experts_per_token) * expert
    active = total - idle * (config.num_hidden_layers - config.first_k_dense_replace)
    assert abs(active / 3e9 - 1) < 0.2
    # One query and one key gain for each of 54 sublayers and the output.
    assert sum(p.numel() for p in model.residual.parameters()) == 55 * 2 * 2304
    assert model.residual.num_blocks == 9
    assert sum(config.is_kda_layer(index) for index in range(27)) == 20


def test_a_public_configuration_file_is_read_as_it_is():
    values = presets("tiny").to_dict()
    del values["residual"], values["sublayers_per_block"]
    del values["linear_attn_config"]["chunk_size"]
    public = {
        **values,
        "architectures": ["KimiLinearForCausalLM"],
        "hidden_act": "silu",
        "mla_use_nope": True,
        "moe_layer_freq": 1,
        "moe_router_activation_func": "sigmoid",
        "num_expert_group": 1,
        "num_key_value_heads": 2,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "topk_group": 1,
        "torch_dtype": "bfloat16",
    }
    config = KimiLinearConfig.from_dict(public)
    assert config.residual == "standard"
    # Kimi K3 counts decoder layers of two sublayers each.
    config = KimiLinearConfig.from_dict({**public, "attn_res_block_size": 2})
    assert (config.residual, config.sublayers_per_block) == ("block", 4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": 0}, "hidden_size is 0, expected a positive integer"),
        ({"vocab_size": 2.5}, "vocab_size is 2.5, expected a positive integer"),
        ({"hiden_size": 8}, "hiden_size is not a known field; did you mean hidden_size?"),
        ({"num_hidden_layers": 5}, "expected each of the layers 1 to 5"),
        ({"num_experts_per_token": 5}, "from 1 to 4, as num_experts is 4"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is None"),
        ({"residual": "deep"}, "residual is 'deep', expected one of standard, block, full"),
        ({"sublayers_per_block": 9}, "from 1 to 8: the sublayers of the model"),
        ({"sublayers_per_block": None}, "sublayers_per_block is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"linear_attn_config": None}, "expected an object with kda_layers"),
        ({"linear_attn_config": {"num_heads": 2}}, "linear_attn_config.kda_layers"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0, expected a number above 0"),
        ({"qk_rope_head_dim": -1}, "qk_rope_head_dim is -1, expected an integer of at least 0"),
        ({"num_shared_experts": -1}, "num_shared_experts is -1, expected an integer of at least 0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_mistakes_give_sentences(changes, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        presets("tiny", **changes)


def test_mistakes_in_linear_attn_config_give_sentences():
    linear = presets("tiny").to_dict()["linear_attn_config"]
    for name, value, sentence in (
        ("chunk_size", 24, "chunk_size is 24, expected a power of two"),
        ("gate_lower_bound", 5.0, "gate_lower_bound is 5.0, expected a number below 0, or null"),
        ("kda_layers", [0, 1, 2], "expected each of the layers 1 to 4"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            presets("tiny", linear_attn_config={**linear, name: value})


def test_all_mistakes_are_named_at_once():
    with pytest.raises(ValueError, match=r"hidden_size is -1.*residual is 'none'"):
        presets("tiny", hidden_size=-1, residual="none")


def test_an_unknown_preset_and_a_broken_file_give_sentences(tmp_path):
    with pytest.raises(ValueError, match="name is 'huge', expected one of tiny, demo"):
        presets("huge")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        KimiLinearConfig.from_json(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        KimiLinearConfig.from_json(tmp_path)


def places(values, path=()):
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


@pytest.mark.parametrize("path", list(places(presets("tiny").to_dict())), ids=".".join)
def test_any_value_in_any_place_gives_a_configuration_or_a_sentence(path):
    for value in (0, -1, 1.5, float("nan"), 10**30, "x", "", True, None, [], [0], {}):
        values = copy.deepcopy(presets("tiny").to_dict())
        inner = values
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        message = ""
        try:
            KimiLinearConfig.from_dict(values)
        except ValueError as error:
            message = str(error)
        assert message == "" or (message.startswith("KimiLinearConfig: ") and path[-1] in message)


@pytest.mark.parametrize("size", [0, -2, 1.5, "3", True])
def test_block_size_in_decoder_layers_must_be_one(size):
    values = presets("tiny").to_dict() | {"attn_res_block_size": size}
    with pytest.raises(ValueError, match=r"attn_res_block_size is .*, expected a positive"):
        KimiLinearConfig.from_dict(values)


def test_kimi_k3_s_variants_come_from_its_own_fields():
    """Bounded decay, full-rank gates, and blocks of whole layers, the last of them partial."""
    values = presets("tiny").to_dict()
    del values["residual"], values["sublayers_per_block"]
    values |= {"attn_res_block_size": 3, "mla_use_output_gate": True, "q_lora_rank": 8}
    values["linear_attn_config"] |= {"gate_lower_bound": -5.0, "use_full_rank_gate": True}
    config = KimiLinearConfig.from_dict(values)
    assert (config.residual, config.sublayers_per_block) == ("block", 6)
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(config).double().eval()
    residual = model.residual
    assert residual.num_blocks == 2
    assert [len(residual.sites_of_block(block)) for block in (1, 2)] == [6, 2]
    assert residual.sources_at(8) == ["embedding", "block 1", "block 2"]
    with torch.no_grad():
        for query in residual.queries:
            query.normal_()
    ids = torch.randint(256, (2, 17))
    state = model.new_state(2, 17)
    parts = [model(part, state=state).logits for part in ids.split([11, 1, 1, 4], dim=1)]
    # The block cache keeps reciprocal RMS in float32.
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, rtol=1e-6, atol=1e-6)
