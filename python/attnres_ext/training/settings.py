"""Every choice of a training run, in one place.

``attnres train`` has an option for each field, with the help that stands here; ``run.json`` holds
them all, and a resumed run takes its own from there.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from attnres_ext.fields import field, plain, problems
from attnres_ext.residual_variants import MODES

_run = partial(field, group="run")
_text = partial(field, group="text")
_model = partial(field, group="model")
_optimization = partial(field, group="optimization")
_machine = partial(field, group="machine")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What defines a run; each field's ``help`` says what it decides.

    Raises:
        ValueError: For a value that is not as declared here.
    """

    checkpoint_every: int = _run(
        50, least=1, metavar="STEPS",
        help="steps between checkpoints; the last step always has one",
    )  # fmt: skip
    keep_checkpoints: int = _run(
        1, least=1, metavar="N", help="how many checkpoints stay, the newest ones"
    )
    validate_every: int = _run(50, least=1, metavar="STEPS", help="steps between validations")
    validation_batches: int = _run(
        8, least=1, metavar="N", help="batches of a validation, spread over the held-out text"
    )

    text: Path | None = _text(
        None, metavar="FILE_OR_DIR",
        help="what to learn: a file, a folder with all its text files, or a pipe, whose text the "
        "run keeps (default: the sources of Python's standard library)",
    )  # fmt: skip
    tokenizer: str = _text(
        "byte", one_of=("byte", "bpe"), metavar="KIND",
        help="byte (any file) or bpe (UTF-8 only; learnt from the training part)",
    )  # fmt: skip
    vocab_size: int = _text(
        4096, least=300, most=2**20, metavar="N", help="ids of the bpe tokenizer"
    )
    validation_fraction: float = _text(
        0.05, above=0, most=0.5, metavar="SHARE", help="share of the text held out"
    )
    sequence_length: int = _text(
        256, least=2, metavar="TOKENS", help="tokens of a training sequence"
    )

    residuals: tuple[str, ...] = _model(
        ("standard", "block"), one_of=MODES, options=("--residual",), metavar="MODES",
        help="arms to train, of standard, block and full, with commas between",
    )  # fmt: skip
    preset: str = _model(
        "demo", one_of=("tiny", "demo", "small"), metavar="NAME", either="model",
        help="size of the model: tiny, demo or small",
    )  # fmt: skip
    config: Path | None = _model(
        None, metavar="FILE", either="model",
        help="configuration of the model in JSON, in place of a preset",
    )  # fmt: skip
    sublayers_per_block: int | None = _model(
        None, least=1, metavar="N",
        help="attention and MLP sublayers in one block (default: the model's own)",
    )  # fmt: skip

    steps: int = _optimization(300, least=1, metavar="N", help="optimizer steps")
    seeds: tuple[int, ...] = _optimization(
        (0,), least=0, most=2**31, options=("--seed", "--seeds"), metavar="N[,N...]",
        help="each arm is trained once per seed; a seed decides weights and batches",
    )  # fmt: skip
    batch_size: int = _optimization(4, least=1, metavar="N", help="sequences per step")
    learning_rate: float = _optimization(
        4e-3, above=0, metavar="RATE", help="peak of the cosine schedule"
    )
    final_learning_rate: float = _optimization(
        0.1, least=0, most=1, metavar="SHARE",
        help="where the cosine ends, as a share of the peak",
    )  # fmt: skip
    warmup_steps: int = _optimization(20, least=0, metavar="N", help="steps of linear warm-up")
    weight_decay: float = _optimization(
        0.1, least=0, metavar="RATE", help="AdamW's decay of matrices; vectors have none"
    )
    gradient_clip: float = _optimization(1.0, above=0, metavar="NORM", help="largest gradient norm")

    device: str = _machine(
        "cpu", help="cpu, cuda, cuda:1, ...; under torchrun each process takes its own"
    )
    precision: str = _machine(
        "float32", one_of=("float32", "bfloat16"), metavar="DTYPE",
        help="float32, or bfloat16 by autocast (weights stay float32)",
    )  # fmt: skip
    gradient_accumulation: int = _machine(
        1, least=1, metavar="N",
        help="compute a batch in N parts, one after the other: less memory, same values; the "
        "microbatches of a pipeline",
    )  # fmt: skip
    activation_checkpointing: bool = _machine(
        False, help="compute sublayers again in the backward: less memory, same values"
    )
    compile: bool = _machine(False, help="compile sublayers with torch.compile")

    def __post_init__(self) -> None:
        if wrong := problems(self):
            raise ValueError("; ".join(wrong))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``run.json``; :func:`attnres_ext.fields.build` undoes it."""
        return {entry.name: plain(getattr(self, entry.name)) for entry in dataclasses.fields(self)}
