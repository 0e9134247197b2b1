"""Fine-tunes a model of the transformers library with Attention Residuals.

    python examples/finetune_transformers.py --model NAME_OR_PATH
    python examples/finetune_transformers.py --model NAME_OR_PATH --lora

Without --model it makes a small Llama with random weights that reads bytes, to run anywhere. Needs
`pip install 'attnres-ext[transformers]' accelerate`, and `peft` for --lora.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from attnres_ext.integrations.transformers import attach, attention_residuals, from_pretrained


def small_llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=6,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def read_tokens(text: bytes, model_name: str | None) -> Tensor:
    if model_name is None:
        return torch.tensor(list(text))
    return torch.tensor(AutoTokenizer.from_pretrained(model_name)(text.decode())["input_ids"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="name or folder of a causal language model")
    parser.add_argument("--text", help="a file to train on; a module of Python's without it")
    parser.add_argument("--sublayers-per-block", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--lora", action="store_true", help="train adapters, not the model")
    parser.add_argument("--out", default="runs/finetune", help="where checkpoints go")
    options = parser.parse_args()
    if options.text is not None and not Path(options.text).is_file():
        parser.error(f"--text {options.text} is no file")

    torch.manual_seed(0)
    if options.model is None:
        model = small_llama()
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model)
    path = Path(options.text or Path(sysconfig.get_path("stdlib")) / "argparse.py")
    tokens = read_tokens(path.read_bytes(), options.model)
    rows = tokens[: len(tokens) // options.length * options.length].view(-1, options.length)

    # Attached, it computes what it computed before: training goes on from where it was.
    with torch.no_grad():
        before = model.eval()(rows[:2]).logits
        attach(model, sublayers_per_block=options.sublayers_per_block)
        after = model(rows[:2]).logits
    residual = attention_residuals(model)
    print(f"{residual.num_sublayers} sublayers in {residual.num_blocks} blocks")
    print(
        f"attaching moved the logits by {(after - before).norm() / before.norm():.1e} of their size"
    )

    trained = model
    if options.lora:
        import peft

        trained = peft.get_peft_model(
            model,
            peft.LoraConfig(
                target_modules="all-linear", modules_to_save=["attn_res"], task_type="CAUSAL_LM"
            ),
        )
        trained.print_trainable_parameters()
    trainer = Trainer(
        trained,
        TrainingArguments(
            options.out,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=options.learning_rate,
            warmup_steps=options.steps // 10,
            logging_steps=max(1, options.steps // 4),
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=[],
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    )
    trainer.train()

    # What attention over depth learnt, at the output: a weight per block.
    residual = attention_residuals(model)
    with torch.no_grad(), residual.recording() as record:
        model.eval()(rows[:2].to(model.device))
    output = residual.num_sublayers
    for source, weight in zip(residual.sources_at(output), record.weights[output], strict=True):
        print(f"the output reads {weight:.3f} of {source}")

    trained.save_pretrained(options.out)
    if not options.lora:
        loaded = from_pretrained(options.out).to(model.device).eval()
        with torch.no_grad():
            same = torch.equal(loaded(rows[:2]).logits, model(rows[:2]).logits)
        print(f"saved in {options.out}; loaded again it computes the same: {same}")


if __name__ == "__main__":
    main()
