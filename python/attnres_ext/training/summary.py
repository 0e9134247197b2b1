"""What a run came to: a row per residual mode."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from attnres_ext.training.loop import Record

# The first steps fill the allocator's and the processor's caches and say nothing of the rest.
_UNTIMED_STEPS = 5


@dataclass(frozen=True)
class Overhead:
    """How much longer a step takes than the standard residual's.

    Attributes:
        percent: Median over steps of (time of this arm / time of standard at the same step) - 1.
        low: Lower end of the median's 95 % confidence interval.
        high: Upper end.
    """

    percent: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """Outcome of one residual mode, averaged over seeds.

    Attributes:
        arm: Residual mode.
        parameters: Number of trainable weights.
        train_loss: Mean over the last 5 % of the steps, nats a token.
        val_loss: After the last validation, nats a token; None before the first.
        val_loss_deviation: Standard deviation over seeds; None with a single seed.
        bits_per_byte: The validation loss, comparable between tokenizers.
        ms_per_step: Median wall time of a step in milliseconds; None for very short runs.
        overhead: Against standard; None for standard itself, and without it.
    """

    arm: str
    parameters: int
    train_loss: float | None
    val_loss: float | None
    val_loss_deviation: float | None
    bits_per_byte: float | None
    ms_per_step: float | None
    overhead: Overhead | None


def summarize(
    records: Sequence[Record], parameters: Mapping[str, int], bytes_per_token: float
) -> list[Row]:
    """One row per residual mode.

    Args:
        records: A run's metrics.
        parameters: Number of weights per residual mode; its order is that of the rows.
        bytes_per_token: Of the validation text.
    """
    rows = []
    last = max((record.step for record in records), default=0)
    for arm, count in parameters.items():
        mine = [record for record in records if record.arm == arm]
        tail = [record.loss for record in mine if record.step > 0.95 * last and record.loss]
        finals = _last_validation(mine)
        times = [record.ms for record in mine if record.ms and record.step > _UNTIMED_STEPS]
        val_loss = fmean(finals) if finals else None
        rows.append(
            Row(
                arm=arm,
                parameters=count,
                train_loss=fmean(tail) if tail else None,
                val_loss=val_loss,
                val_loss_deviation=stdev(finals) if len(finals) > 1 else None,
                bits_per_byte=val_loss / math.log(2) / bytes_per_token if val_loss else None,
                ms_per_step=median(times) if times else None,
                overhead=_overhead(records, arm) if arm != "standard" else None,
            )
        )
    return rows


def _last_validation(records: Sequence[Record]) -> list[float]:
    finals = {record.seed: record.val_loss for record in records if record.val_loss is not None}
    return list(finals.values())


def _overhead(records: Sequence[Record], arm: str) -> Overhead | None:
    times = {
        (record.arm, record.seed, record.step): record.ms
        for record in records
        if record.ms and record.step > _UNTIMED_STEPS
    }
    # Steps of two arms at the same step ran within the same second, on the same batch.
    ratios = sorted(
        ms / times["standard", seed, step]
        for (name, seed, step), ms in times.items()
        if name == arm and ("standard", seed, step) in times
    )
    if not ratios:
        return None
    # The ranks that enclose the median in 95 % of samples, by the binomial distribution.
    reach = 0.98 * math.sqrt(len(ratios))
    low = ratios[max(0, math.floor(len(ratios) / 2 - reach))]
    high = ratios[min(len(ratios) - 1, math.ceil(len(ratios) / 2 + reach))]
    return Overhead(*(100 * (ratio - 1) for ratio in (median(ratios), low, high)))
