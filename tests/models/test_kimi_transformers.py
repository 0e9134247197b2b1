"""The same weights through transformers' Kimi Linear: names, shapes and mathematics agree."""

import json

import pytest
import torch

from attnres_ext.models.kimi_linear import KimiLinearForCausalLM, presets, save_weights

transformers = pytest.importorskip("transformers")
theirs = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": 6, "num_experts": 7}], ids=str)
def test_transformers_reads_our_checkpoint_and_computes_the_same(tmp_path, changes):
    # A wide initialisation makes every part of the model matter to the logits.
    config = presets("tiny", residual="standard", initializer_range=0.2, **changes)
    model = KimiLinearForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("e_score_correction_bias"):
                tensor.normal_(0, 0.3)
    save_weights(model, tmp_path)
    ours = json.loads((tmp_path / "config.json").read_text())
    for name in ("residual", "sublayers_per_block", "mla_use_output_gate"):
        del ours[name]
    public = {"num_expert_group": 1, "topk_group": 1, "num_key_value_heads": 2, "pad_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(ours | public))

    other, report = theirs.KimiLinearForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(report.values()), report
    ids = torch.randint(3, 256, (2, 37))
    with torch.no_grad():
        actual = model(ids).logits
        expected = other.eval()(input_ids=ids, use_cache=False).logits
    # Some hundred float32 roundings in a row on either side.
    atol = 200 * torch.finfo(torch.float32).eps * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
