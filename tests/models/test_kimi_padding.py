"""Rows of different lengths in one batch: each gives what it gives alone."""

import pytest
import torch

from attnres_ext.models.kimi_linear import KimiLinearForCausalLM, presets

LENGTHS = [7, 1, 12, 40]


def make_model(mode="block"):
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(presets("tiny", residual=mode)).double()
    with torch.no_grad():
        for query in model.residual.queries:
            query.normal_(std=0.3)
    return model


def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(200, (length,), generator=generator) for length in LENGTHS]


def padded(rows, side="left"):
    """The rows as ``[B, T]``, with something odd where no token is, and their mask."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), 77)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", ["standard", "block"])
def test_logits_loss_and_gradients(mode, side):
    model, rows = make_model(mode), prompts()
    ids, mask = padded(rows, side)
    output = model(ids, labels=ids, attention_mask=mask)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for i, row in enumerate(rows):
        assert_close(output.logits[i][mask[i].bool()], model(row[None]).logits[0])
    # The mean over all tokens that have a successor.
    count = sum(len(row) - 1 for row in rows)
    losses = [
        model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows if len(row) > 1
    ]
    loss = sum(losses) / count
    loss.backward()
    assert_close(output.loss, loss)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(gradients[name], parameter.grad)


@pytest.mark.parametrize("chunk_size", [5, 4096])
def test_generation_is_that_of_each_prompt_alone(chunk_size):
    model, rows = make_model(), prompts()
    ids, mask = padded(rows)
    together = torch.stack(
        list(model.generate(ids, 6, attention_mask=mask, chunk_size=chunk_size)), dim=1
    )
    for i, row in enumerate(rows):
        alone = torch.stack(list(model.generate(row[None], 6)), dim=1)
        assert torch.equal(together[i], alone[0])


def test_a_mask_of_ones_changes_nothing():
    model, row = make_model(), prompts()[2][None]
    assert_close(model(row, attention_mask=torch.ones_like(row)).logits, model(row).logits)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 5, dtype=torch.int64), r"attention_mask has shape \(1, 5\)"),
        (torch.ones(2, 4), "dtype torch.float32"),
        (torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), "padded at the left"),
        (torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]), "padded at the left"),
        (torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]), "padded at the left"),
    ],
)
def test_masks_that_do_not_fit(mask, message):
    model, ids = make_model(), torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        list(model.generate(ids, 1, attention_mask=mask))


def test_packed_rows_have_no_padding():
    model, ids = make_model(), torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="cu_seqlens: packed rows have no padding"):
        model(ids, cu_seqlens=torch.tensor([0, 4]), attention_mask=torch.ones_like(ids))
