"""What people do with the library, from its doors, on the device that ``--device`` names.

On a GPU other people's kernels are part of it: flash-linear-attention's in Kimi Linear, inductor's
where a model is compiled.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from attnres_ext.cli import train_run
from attnres_ext.cli.main import main
from attnres_ext.models.kimi_linear import KimiLinearForCausalLM, fla_kernels, presets
from tests.cli.conftest import write_text

WITHOUT, WITH = "plain layers", "flash-linear-attention"


@pytest.fixture(params=[WITHOUT, pytest.param(WITH, marks=pytest.mark.cuda)])
def layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without the kernels that Kimi Linear takes where they are installed."""
    if request.param == WITHOUT:
        monkeypatch.setattr(fla_kernels, "_kernels", lambda: None)
    elif fla_kernels._kernels() is None:
        pytest.skip("flash-linear-attention is not installed")
    else:
        # They multiply float32 in TensorFloat-32, and so may everything else then.
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    return request.param


def train(folder: Path, device: str, *options: str) -> dict[str, list[float]]:
    """Three steps in bfloat16, of the demo where a GPU is: the losses of each arm."""
    argv = [
        "train", "--out", folder / "run", "--text", write_text(folder), "--device", device,
        "--preset", "tiny" if device == "cpu" else "demo", "--precision", "bfloat16",
        "--steps", 3, "--warmup-steps", 1, "--batch-size", 2, "--sequence-length", 32,
        "--validation-batches", 1, "--overwrite", *options,
    ]  # fmt: skip
    assert main([str(argument) for argument in argv]) == 0
    losses: dict[str, list[float]] = {}
    for line in (folder / "run" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record.get("loss") is not None:
            losses.setdefault(record["arm"], []).append(record["loss"])
    return losses


@pytest.fixture(autouse=True)
def _no_plots_and_no_short_floats(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(train_run, "_plot", lambda *_: None)
    # Convolutions would multiply in TensorFloat-32.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def test_training_and_what_comes_of_it(
    device: str, layers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = train(tmp_path, device)
    assert losses.keys() == {"standard", "block"}
    for first, *_, last in losses.values():
        # A fresh model knows nothing of 257 bytes.
        assert first == pytest.approx(math.log(257), rel=0.1)
        assert last < first - 0.1
    # Queries of zero: the same function, in bfloat16.
    assert losses["block"][0] == pytest.approx(losses["standard"][0], rel=0.01)

    run = str(tmp_path / "run")
    capsys.readouterr()
    prompt = ["--prompt", "def f", "--max-new-tokens", "8", "--temperature", "0"]
    assert main(["generate", "--checkpoint", run, "--device", device, *prompt]) == 0
    assert capsys.readouterr().out.startswith("def f")
    options = ["--sequences", "2", "--out", str(tmp_path / "inspected")]
    assert main(["inspect", run, "--device", device, *options]) == 0
    assert any((tmp_path / "inspected").iterdir())


def model_of(**changes: object) -> KimiLinearForCausalLM:
    """Kimi Linear with pseudo-queries as training might leave them; all experts run."""
    config = presets("tiny", residual="block", sublayers_per_block=3, **changes)
    model = KimiLinearForCausalLM(config.replace(num_experts_per_token=config.num_experts))
    with torch.no_grad():
        for query in model.residual.queries:
            query.normal_(std=0.3)
    return model.eval()


def assert_near(name: str, actual: torch.Tensor, exact: torch.Tensor, share: float) -> None:
    """``share`` of the largest value."""
    error = (actual.detach().cpu().double() - exact).abs().max().item()
    assert error <= share * exact.abs().max().item(), f"{name} is off by {error:.2e}"


def test_a_model_computes_what_it_computes_in_float64(device: str, layers: str) -> None:
    """Logits, every gradient, and token after token from a state."""
    model = model_of()
    exact = copy.deepcopy(model).double()
    model.to(device)
    ids = torch.randint(256, (2, 24))
    for one, its in ((exact, ids), (model, ids.to(device))):
        logits = one(its).logits
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), its[:, 1:].flatten()
        ).backward()
    # TensorFloat-32 has 10 bits.
    share = 2e-2 if layers == WITH else 1e-4
    with torch.no_grad():
        expected = exact(ids).logits
        assert_near("logits", model(ids.to(device)).logits, expected, share)
        for (name, parameter), other in zip(
            model.named_parameters(), exact.parameters(), strict=True
        ):
            if other.grad is not None and other.grad.abs().max() > 1e-8:
                assert_near(f"gradient of {name}", parameter.grad, other.grad, 5 * share)
        state = model.new_state(2, 24)
        model.prefill(ids[:, :16].to(device), state, 7)
        for position in range(16, 24):
            token = ids[:, position : position + 1].to(device)
            logits = model(token, state=state).logits[:, 0]
            assert_near(f"logits after {position}", logits, expected[:, position], share)


def test_a_model_of_the_transformers_library(device: str, tmp_path: Path) -> None:
    """Attached: logits and gradients, generating with a cache, and Trainer in bfloat16."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from attnres_ext.integrations.transformers import attach, attention_residuals
    from tests.integrations import tiny_models

    model = attach(tiny_models.make("llama"), sublayers_per_block=2)
    tiny_models.randomise(attention_residuals(model))
    exact = copy.deepcopy(model).double()
    model.to(device)
    ids = tiny_models.tokens(2, 9)
    for one, its in ((exact, ids), (model, ids.to(device))):
        one(its, labels=its).loss.backward()
    with torch.no_grad():
        assert_near("logits", model(ids.to(device)).logits, exact(ids).logits, 1e-4)
    for (name, parameter), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        if other.grad is not None and other.grad.abs().max() > 1e-8:
            assert_near(f"gradient of {name}", parameter.grad, other.grad, 1e-3)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        written = [
            model.generate(ids.to(device), **options, use_cache=use) for use in (True, False)
        ]
    assert torch.equal(*written)

    model.zero_grad(set_to_none=True)
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=4, learning_rate=1e-2, bf16=True, use_cpu=device == "cpu",
        disable_tqdm=True, report_to=[], save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ids]

    def loss() -> float:
        with torch.no_grad():
            return model.eval()(ids.to(device), labels=ids.to(device)).loss.item()

    before = loss()
    transformers.Trainer(model, arguments, train_dataset=data).train()
    assert loss() < before - 0.2


@pytest.mark.cuda
@pytest.mark.parametrize("option", ["--activation-checkpointing", "--compile"])
def test_options_of_training_change_nothing_that_is_learnt(
    option: str, layers: str, tmp_path: Path
) -> None:
    plain, changed = (
        train(tmp_path, "cuda", "--residual", "block", *options)["block"]
        for options in ((), (option,))
    )
    # bfloat16; what compiles a sublayer rounds elsewhere.
    assert changed == pytest.approx(plain, rel=0.02)
