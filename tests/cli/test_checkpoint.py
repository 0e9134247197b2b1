import itertools
import os

import pytest
import torch

from attnres_ext.models.kimi_linear import KimiLinearForCausalLM, presets
from attnres_ext.training.checkpoint import (
    ArmState,
    checkpoints,
    find_arm,
    load_arm,
    save_checkpoint,
    verify,
)
from attnres_ext.training.errors import UserError
from attnres_ext.training.loop import make_optimizer
from attnres_ext.training.settings import Settings
from attnres_ext.training.tokenizer import ByteTokenizer


def make_model(hidden_size):
    return KimiLinearForCausalLM(
        presets(
            "tiny",
            vocab_size=257,
            hidden_size=hidden_size,
            num_hidden_layers=2,
            linear_attn_config={
                "kda_layers": [1],
                "full_attn_layers": [2],
                "num_heads": 1,
                "head_dim": 4,
            },
        )
    )


def make_arm(name="block-seed0", seed=0, steps=2, hidden_size=8):
    torch.manual_seed(seed)
    model = make_model(hidden_size)
    arm = ArmState(name, model, make_optimizer(model, Settings()))
    for _ in range(steps):
        step(arm)
    return arm


def step(arm):
    arm.model(torch.randint(257, (1, 9))).logits.square().sum().backward()
    arm.optimizer.step()
    arm.optimizer.zero_grad()


def test_training_continues_bit_for_bit(tmp_path):
    arm = make_arm()
    path = save_checkpoint(tmp_path, 2, [arm], ByteTokenizer())
    other = make_arm(seed=1, steps=0)
    load_arm(path, other)
    for each in (arm, other):
        torch.manual_seed(5)
        step(each)
    for mine, theirs in zip(arm.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_only_the_newest_checkpoint_stays(tmp_path):
    arm = make_arm()
    for number in (1, 2, 10):
        save_checkpoint(tmp_path, number, [arm], ByteTokenizer())
    assert [number for number, _ in checkpoints(tmp_path)] == [10]
    assert sorted(os.listdir(tmp_path)) == ["step-000010"]


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


# Every call that makes something durable or visible, or removes it.
@pytest.mark.parametrize("count", range(40))
def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path, monkeypatch, count):
    arm = make_arm()
    save_checkpoint(tmp_path, 1, [arm], ByteTokenizer())
    operations = itertools.count()

    def killing(function):
        def call(*args, **kwargs):
            if next(operations) == count:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "rename", "rmdir", "unlink"):
            patch.setattr(os, name, killing(getattr(os, name)))
        try:
            save_checkpoint(tmp_path, 2, [arm], ByteTokenizer())
            finished = True
        except Killed:
            finished = False
    found = list(checkpoints(tmp_path))
    assert found
    for _, path in found:
        verify(path)
        load_arm(path, make_arm(steps=0))
    # The next save cleans up.
    save_checkpoint(tmp_path, 3, [arm], ByteTokenizer())
    assert os.listdir(tmp_path) == ["step-000003"]
    # The range above reaches past the last operation, so none is left out.
    if count == 39:
        assert finished


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["missing", "short", "flipped"])
def test_damage_is_found(tmp_path, name, damage):
    path = save_checkpoint(tmp_path, 1, [make_arm()], ByteTokenizer())
    file = path / "block-seed0" / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "short":
        file.write_bytes(content[:-1])
    else:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=f"damaged: block-seed0/{name}"):
        verify(path)


@pytest.mark.parametrize("content", ["", "[]", "{}", "{"])
def test_damaged_manifest_is_found(tmp_path, content):
    path = save_checkpoint(tmp_path, 1, [make_arm()], ByteTokenizer())
    (path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        verify(path)


def test_weights_of_another_model_are_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, [make_arm()], ByteTokenizer())
    with pytest.raises(UserError, match=r"model\.safetensors cannot be loaded"):
        load_arm(path, make_arm(hidden_size=12, steps=0))


def test_find_arm(tmp_path):
    arms = [make_arm(name) for name in ("standard-seed0", "block-seed0", "block-seed1")]
    path = save_checkpoint(tmp_path / "checkpoints", 4, arms, ByteTokenizer())
    for start in (tmp_path, tmp_path / "checkpoints", path):
        assert find_arm(start, None) == path / "block-seed0"
        assert find_arm(start, "standard") == path / "standard-seed0"
        assert find_arm(start, "block-seed1") == path / "block-seed1"
    assert find_arm(path / "standard-seed0", None) == path / "standard-seed0"
    with pytest.raises(UserError, match=r"--arm full is not in .*block-seed1"):
        find_arm(tmp_path, "full")
    with pytest.raises(UserError, match="does not exist"):
        find_arm(tmp_path / "nowhere", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_arm(tmp_path / "empty", None)
