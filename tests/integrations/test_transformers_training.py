"""Trainer and PEFT do with an attached model what they do with any."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

import peft
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

from attnres_ext.integrations.transformers import (
    attach,
    attention_residuals,
    detach,
    from_pretrained,
)
from tests.integrations import tiny_models


@pytest.fixture
def model():
    return attach(tiny_models.make("llama"), sublayers_per_block=2)


def trainer(model, folder, ids, **options):
    arguments = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "logging_strategy": "no",
    }
    data = [{"input_ids": row, "labels": row} for row in ids]
    return Trainer(model, TrainingArguments(folder, **(arguments | options)), train_dataset=data)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_trainer_trains_every_part(model, options, tmp_path):
    ids = tiny_models.tokens(8, 11)
    before = copy.deepcopy(model.state_dict())

    def loss():
        with torch.no_grad():
            return model.eval()(ids, labels=ids).loss.item()

    first = loss()
    trainer(model, tmp_path, ids, **options).train()
    assert loss() < first - 0.2
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    alone = {"model.attn_res.queries.0", "model.attn_res.key_weights.0"}  # site 0: one source
    assert moved == before.keys() - alone
    loaded = from_pretrained(tmp_path / "checkpoint-4").state_dict()
    assert all(torch.equal(tensor, loaded[n]) for n, tensor in model.state_dict().items())


def test_trainer_resumes(model, tmp_path):
    ids = tiny_models.tokens(8, 11)
    twin, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    trainer(model, tmp_path, ids).train()
    expected = model.state_dict()
    trainer(twin, tmp_path, ids).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    # Adam moves a parameter whose gradient is all but zero by a sign, which may be a rounding.
    for name, tensor in twin.state_dict().items():
        moved = expected[name] - before[name]
        assert (tensor - expected[name]).norm() <= 0.05 * moved.norm(), name


def adapted(model, **options):
    config = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(**(config | options)))


def steps(model, ids, count=4):
    """Losses of a few steps of gradient descent, and the names of what they change."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.5)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {n for n, p in parameters.items() if not torch.equal(p, before[n])}


def test_lora_on_an_attached_model(model, tmp_path):
    ids = tiny_models.tokens()
    base = copy.deepcopy(model)
    expected = model(ids).logits
    adapter = adapted(model, modules_to_save=["attn_res"])
    tiny_models.assert_same(adapter(input_ids=ids).logits, expected)
    losses, moved = steps(adapter, ids)
    assert losses[-1] < losses[0]
    assert any("lora_B" in name for name in moved)
    assert sum("attn_res" in name and "queries" in name for name in moved) == 6
    assert adapter.generate(input_ids=ids, max_new_tokens=3).shape == (2, 14)

    adapter.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    result = adapter.eval()(input_ids=ids).logits
    tiny_models.assert_same(loaded(input_ids=ids).logits, result)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, result, rtol=1e-4, atol=1e-4)
    assert any(query.any() for query in attention_residuals(merged).queries)


def test_lora_alone_leaves_attention_residuals_frozen(model):
    _, moved = steps(adapted(model), tiny_models.tokens())
    assert moved
    assert all("lora" in name for name in moved)


def test_attaching_to_a_model_with_lora():
    ids = tiny_models.tokens()
    adapter = adapted(tiny_models.make("llama"))
    expected = adapter(input_ids=ids).logits
    attach(adapter, sublayers_per_block=2)
    torch.testing.assert_close(adapter(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    _, moved = steps(adapter, ids)
    assert any("lora_B" in name for name in moved)
    assert any("queries" in name for name in moved)
    detach(adapter)


def test_adapters_of_norms_read_sites(model):
    """The adapter is a copy of the norm, in the place of the norm."""
    ids = tiny_models.tokens()
    expected = model(ids).logits
    norms = ["input_layernorm", "post_attention_layernorm"]
    config = peft.LNTuningConfig(target_modules=norms, task_type="CAUSAL_LM")
    adapter = peft.get_peft_model(model, config)
    tiny_models.assert_same(adapter(input_ids=ids).logits, expected)
    losses, moved = steps(adapter, ids)
    assert len(moved) == 6
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_virtual_tokens(model, kind):
    ids = tiny_models.tokens()
    adapter = peft.get_peft_model(model, kind(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    losses, moved = steps(adapter, ids)
    assert moved
    assert losses[-1] < losses[0]


def test_hooks_of_accelerate_stay():
    """They are around the layers of whatever `device_map` placed."""
    model = tiny_models.make("llama")
    ids = tiny_models.tokens()
    expected = model(ids).logits
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    attach(model, sublayers_per_block=2)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    detach(model)
    assert "forward" in vars(model.model.layers[0])
    tiny_models.assert_same(model(ids).logits, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sharded_layers_have_the_same_gradients(model, checkpointing):
    """One process stands for many: parameters are gathered and freed around each layer all the
    same."""
    tiny_models.randomise(attention_residuals(model))
    ids = tiny_models.tokens()
    sharded = copy.deepcopy(model)
    model(ids, labels=ids).loss.backward()
    if checkpointing:
        sharded.train().activation_checkpointing_enable()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        sharded(ids, labels=ids).loss.backward()
        found = {name: p.grad.full_tensor() for name, p in sharded.named_parameters()}
    finally:
        distributed.destroy_process_group()
    tiny_models.assert_same(found, {name: p.grad for name, p in model.named_parameters()})
