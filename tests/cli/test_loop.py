import math
from itertools import pairwise

import pytest
import torch

from attnres_ext.models.kimi_linear import KimiLinearForCausalLM, presets
from attnres_ext.training.data import read_text, tokenize
from attnres_ext.training.errors import UserError
from attnres_ext.training.loop import (
    Record,
    build_arms,
    depth_weights,
    learning_rate,
    make_optimizer,
    train,
)
from attnres_ext.training.settings import Settings
from attnres_ext.training.summary import summarize
from attnres_ext.training.tokenizer import ByteTokenizer

SETTINGS = Settings(
    residuals=("standard", "block", "full"),
    steps=3,
    batch_size=2,
    sequence_length=24,
    warmup_steps=1,
    validation_batches=1,
)


@pytest.fixture
def corpus(text):
    return tokenize(read_text(text), ByteTokenizer(), SETTINGS.sequence_length)


def make_model(residual):
    return KimiLinearForCausalLM(presets("tiny", vocab_size=257, residual=residual))


def test_schedule_warms_up_and_ends_at_its_floor():
    settings = Settings(steps=100, warmup_steps=10, learning_rate=2.0, final_learning_rate=0.1)
    rates = [learning_rate(settings, step) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert all(before > after for before, after in pairwise(rates[9:]))
    assert rates[-1] == pytest.approx(0.2)
    assert learning_rate(settings, 55) == pytest.approx(2 * (0.1 + 0.9 / 2))
    assert learning_rate(Settings(steps=5, warmup_steps=0), 5) > 0
    assert learning_rate(Settings(steps=5, warmup_steps=50), 5) == pytest.approx(4e-4)


def test_only_matrices_are_decayed():
    model = make_model("block")
    decayed, kept = make_optimizer(model, Settings(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3
    assert kept["weight_decay"] == 0
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    kept_ids = {id(parameter) for parameter in kept["params"]}
    assert all(id(query) in kept_ids for query in model.residual.queries)
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def test_arms_start_from_the_same_weights():
    standard, block, full = build_arms(SETTINGS, make_model)
    weights = dict(standard.model.named_parameters())
    for arm in (block, full):
        own = dict(arm.model.named_parameters())
        assert weights.keys() < own.keys()
        assert all(torch.equal(weights[name], own[name]) for name in weights)
        assert not any(own[name] is weights[name] for name in weights)
        assert all(".residual." in name for name in own.keys() - weights.keys())


def test_seeds_differ():
    first, second = build_arms(Settings(residuals=("block",), seeds=(0, 1)), make_model)
    assert not torch.equal(first.model.lm_head.weight, second.model.lm_head.weight)


def test_arms_do_not_disturb_one_another(corpus):
    """An arm's losses are the same whoever else is trained beside it."""

    def losses(residuals):
        settings = Settings(**{**vars(SETTINGS), "residuals": residuals})
        steps = train(build_arms(settings, make_model), corpus, settings, 1)
        return {
            (record.arm, record.step, name): value
            for records in steps
            for record in records
            for name, value in (("loss", record.loss), ("val_loss", record.val_loss))
            if value is not None
        }

    together = losses(("standard", "block", "full"))
    assert len({(arm, step) for arm, step, _ in together}) == 3 * 4
    for residual in ("standard", "block", "full"):
        alone = losses((residual,))
        assert alone == pytest.approx({key: together[key] for key in alone}, rel=1e-6)


def test_first_losses_agree_and_all_fall(corpus):
    settings = Settings(**{**vars(SETTINGS), "steps": 25, "validate_every": 25})
    steps = list(train(build_arms(settings, make_model), corpus, settings, 1))
    first = [record.val_loss for record in steps[0]]
    # Zero queries average what standard sums; the norm removes the factor, up to its epsilon.
    assert first == pytest.approx([first[0]] * 3, abs=1e-2)
    assert first[0] == pytest.approx(math.log(257), abs=0.3)
    for before, after in zip(first, steps[-1], strict=True):
        assert after.val_loss < before - 1


def test_depth_weights_are_distributions(corpus):
    _, block, full = build_arms(SETTINGS, make_model)
    for arm in (block, full):
        weights = depth_weights(arm, corpus, SETTINGS)
        residual = arm.model.residual
        assert [len(row) for row in weights] == [
            len(residual.sources_at(site)) for site in range(residual.num_sites)
        ]
        for row in weights:
            # Zero queries: plain averages.
            assert row == pytest.approx([1 / len(row)] * len(row), abs=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run(corpus):
    arms = build_arms(SETTINGS, make_model)
    with torch.no_grad():
        arms[1].model.lm_head.weight.fill_(math.nan)
    with pytest.raises(UserError, match=r"arm block-seed0: .*nan.*--learning-rate"):
        list(train(arms, corpus, SETTINGS, 1))


def test_summary_pairs_steps_for_the_overhead():
    records = []
    for step in range(1, 41):
        # The machine becomes three times as slow halfway; block is always 10 % slower.
        base = 10.0 if step <= 20 else 30.0
        for arm, factor in (("standard", 1.0), ("block", 1.1)):
            loss = 2.0 if arm == "standard" else 1.9
            val = loss + 0.1 if step == 40 else None
            records.append(Record(arm, 0, step, step * 8, loss, val, 1e-3, 1.0, base * factor))
    standard, block = summarize(records, {"standard": 5, "block": 6}, bytes_per_token=2.0)
    assert standard.overhead is None
    assert block.overhead.percent == pytest.approx(10)
    assert block.overhead.low == pytest.approx(10)
    assert (block.train_loss, block.val_loss) == (1.9, 2.0)
    assert block.bits_per_byte == pytest.approx(2.0 / math.log(2) / 2)
    assert standard.ms_per_step in (10.0, 30.0)
    assert block.val_loss_deviation is None


def test_summary_averages_seeds():
    records = [
        Record("block", seed, 1, 8, 2.0 + seed, 3.0 + seed, 1e-3, 1.0, 10.0) for seed in (0, 1)
    ]
    (row,) = summarize(records, {"block": 6}, bytes_per_token=1.0)
    assert (row.train_loss, row.val_loss) == (2.5, 3.5)
    assert row.val_loss_deviation == pytest.approx(math.sqrt(0.5))
    assert row.ms_per_step is None
    assert row.overhead is None
