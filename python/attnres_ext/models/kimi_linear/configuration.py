"""Configurations of Kimi Linear: the public ``config.json`` and two fields for residuals."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["KimiLinearConfig", "LinearAttentionConfig", "preset_names", "presets"]

RESIDUAL_MODES = ("standard", "block", "full")

# Keys of public configuration files that say nothing about the computation here.
_IGNORED_KEYS = frozenset(
    (
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "head_dim",
        "model_type",
        "num_key_value_heads",
        "num_nextn_predict_layers",
        "pad_token_id",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "use_grouped_topk",
    )
)
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "v_head_dim",
    "model_max_length",
)
# Fields with one supported value: the architecture's other branches are not built.
_FIXED = {
    "hidden_act": "silu",
    "moe_router_activation_func": "sigmoid",
    "mla_use_nope": True,
    "moe_layer_freq": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "routed_expert_hidden_size": None,
}


@dataclass
class LinearAttentionConfig:
    """``linear_attn_config``: which layers are KDA, and how wide (Kimi Linear report, §3-4).

    Attributes:
        kda_layers: Layers with Kimi Delta Attention, counted from 1.
        full_attn_layers: Layers with full (MLA) attention, counted from 1.
        num_heads: KDA heads.
        head_dim: Key and value channels of a KDA head; also the rank of the decay's and the gate's
            projections.
        short_conv_kernel_size: Taps of the causal convolutions on queries, keys and values.
        gate_lower_bound: None for Kimi Linear's decay ``-exp(A) softplus(z)``; Kimi K3 bounds it,
            ``bound * sigmoid(exp(A) z)``.
        use_full_rank_gate: Kimi K3's output gate, one full matrix instead of two of rank
            ``head_dim``.
        chunk_size: Tokens of a chunk in the chunkwise form; changes speed, not values.
    """

    kda_layers: list[int]
    full_attn_layers: list[int]
    num_heads: int
    head_dim: int
    short_conv_kernel_size: int = 4
    gate_lower_bound: float | None = None
    use_full_rank_gate: bool = False
    chunk_size: int = 32


@dataclass
class KimiLinearConfig:
    """Every choice that defines a model; what is no size defaults to Kimi-Linear-48B-A3B's.

    ``residual`` and ``sublayers_per_block`` are the two fields of ours: how sublayers are connected
    ("standard": sums; "block" and "full": attention over depth) and how many sublayers, attention
    and feed-forward each counting as one, a block sums up (None unless ``residual="block"``).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    linear_attn_config: LinearAttentionConfig
    q_lora_rank: int | None = None
    mla_use_output_gate: bool = False
    num_experts: int | None = None
    num_experts_per_token: int = 8
    num_shared_experts: int = 1
    moe_intermediate_size: int | None = None
    moe_renormalize: bool = True
    routed_scaling_factor: float = 2.446
    first_k_dense_replace: int = 1
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    model_max_length: int = 1_048_576
    residual: str = "standard"
    sublayers_per_block: int | None = None

    @property
    def num_sublayers(self) -> int:
        """Attention and feed-forward sublayers together: two a layer."""
        return 2 * self.num_hidden_layers

    def is_kda_layer(self, index: int) -> bool:
        """Whether layer ``index``, counted from 0, is a KDA layer."""
        return index + 1 in self.linear_attn_config.kda_layers

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer ``index``, counted from 0, has experts instead of one dense network."""
        return self.num_experts is not None and index >= self.first_k_dense_replace

    def validate(self) -> KimiLinearConfig:
        """Returns itself, or raises a ``ValueError`` that names every field that cannot work."""
        problems = _type_problems(self, "")
        problems += _type_problems(self.linear_attn_config, "linear_attn_config.")
        if not problems:  # what relates fields to one another takes their types for granted
            problems = self._size_problems() + self._layer_problems()
            problems += self._expert_problems() + self._residual_problems()
        if problems:
            raise ValueError("KimiLinearConfig: " + "; ".join(problems))
        return self

    def _size_problems(self) -> list[str]:
        linear = self.linear_attn_config
        sizes = {name: getattr(self, name) for name in _SIZES}
        if self.q_lora_rank is not None:
            sizes["q_lora_rank"] = self.q_lora_rank
        for name in ("num_heads", "head_dim", "short_conv_kernel_size", "chunk_size"):
            sizes[f"linear_attn_config.{name}"] = getattr(linear, name)
        problems = [
            f"{name} is {value!r}; it must be a positive integer"
            for name, value in sizes.items()
            if value < 1
        ]
        if self.qk_rope_head_dim < 0:
            problems.append(
                f"qk_rope_head_dim is {self.qk_rope_head_dim!r}; it must be an integer of at "
                "least 0"
            )
        chunk = linear.chunk_size
        if chunk > 0 and chunk & (chunk - 1):
            problems.append(f"linear_attn_config.chunk_size is {chunk}; it must be a power of two")
        if linear.gate_lower_bound is not None and not linear.gate_lower_bound < 0:
            problems.append(
                f"linear_attn_config.gate_lower_bound is {linear.gate_lower_bound}; a "
                "log-decay's lower "
                "bound must be negative, or null for no bound"
            )
        if not self.rms_norm_eps > 0:
            problems.append(f"rms_norm_eps is {self.rms_norm_eps}; it must be positive")
        if self.initializer_range < 0:
            problems.append(f"initializer_range is {self.initializer_range}; it must be at least 0")
        return problems

    def _layer_problems(self) -> list[str]:
        kda, full = self.linear_attn_config.kda_layers, self.linear_attn_config.full_attn_layers
        if sorted([*kda, *full]) == list(range(1, self.num_hidden_layers + 1)):
            return []
        return [
            f"linear_attn_config.kda_layers {kda} and full_attn_layers {full} must together name "
            "each of the layers "
            f"1 to {self.num_hidden_layers} (num_hidden_layers) once"
        ]

    def _expert_problems(self) -> list[str]:
        if self.num_experts is None:
            return []
        problems = []
        if self.num_experts < 1:
            problems.append(
                f"num_experts is {self.num_experts!r}; it must be a positive integer, or null "
                "for dense layers"
            )
        elif not 1 <= self.num_experts_per_token <= self.num_experts:
            problems.append(
                f"num_experts_per_token is {self.num_experts_per_token}; it must lie between 1 and "
                f"num_experts = {self.num_experts}"
            )
        if self.moe_intermediate_size is None or self.moe_intermediate_size < 1:
            problems.append(
                f"moe_intermediate_size is {self.moe_intermediate_size!r}; with experts it must "
                "be a positive "
                "integer"
            )
        if self.num_shared_experts < 0 or self.first_k_dense_replace < 0:
            problems.append(
                f"num_shared_experts is {self.num_shared_experts} and first_k_dense_replace is "
                f"{self.first_k_dense_replace}; neither may be negative"
            )
        return problems

    def _residual_problems(self) -> list[str]:
        per_block = self.sublayers_per_block
        if self.residual not in RESIDUAL_MODES:
            return [f"residual is {self.residual!r}; it must be one of {', '.join(RESIDUAL_MODES)}"]
        if self.residual == "block" and (
            per_block is None or not 1 <= per_block <= self.num_sublayers
        ):
            return [
                f"sublayers_per_block is {per_block!r}; with residual='block' it must lie "
                "between 1 and the "
                f"{self.num_sublayers} sublayers of the model (two a layer)"
            ]
        return []

    def replace(self, **changes: Any) -> KimiLinearConfig:
        """A validated copy with fields changed, e.g. ``config.replace(residual="full")``."""
        return type(self).from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a ``config.json``; :meth:`from_dict` undoes it."""
        return {"model_type": "kimi_linear", **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> KimiLinearConfig:
        """Builds and validates a configuration from the contents of a ``config.json``.

        Public Kimi Linear files are read as they are. Kimi K3's ``attn_res_block_size`` counts
        decoder layers: it becomes ``residual="block"`` with twice as many sublayers a block. A key
        that is unknown, and a branch of the architecture that is not built here, are errors
        (``ValueError``) rather than silently another model.
        """
        values = {str(key): value for key, value in values.items() if key not in _IGNORED_KEYS}
        if (layers_per_block := values.pop("attn_res_block_size", None)) is not None:
            if not _is_int(layers_per_block) or layers_per_block < 1:
                raise ValueError(
                    f"KimiLinearConfig: attn_res_block_size is {layers_per_block!r}; it must be a "
                    "positive integer, of decoder layers"
                )
            values = {"residual": "block", "sublayers_per_block": 2 * layers_per_block, **values}
        for key, supported in _FIXED.items():
            if (value := values.pop(key, supported)) != supported:
                raise ValueError(
                    f"KimiLinearConfig: {key} is {value!r}; only {supported!r} is supported"
                )
        linear = values.get("linear_attn_config")
        if isinstance(linear, dict):
            values["linear_attn_config"] = _build(
                LinearAttentionConfig, linear, "linear_attn_config."
            )
        elif not isinstance(linear, LinearAttentionConfig):
            raise ValueError(
                f"KimiLinearConfig: linear_attn_config is {linear!r}; it must be an object with "
                "kda_layers, "
                "full_attn_layers, num_heads and head_dim"
            )
        return _build(cls, values, "").validate()

    @classmethod
    def from_json(cls, path: str | Path) -> KimiLinearConfig:
        """Reads a ``config.json``, or the one in a folder."""
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(
                f"{path} holds a {type(values).__name__}; a configuration must be a JSON object"
            )
        return cls.from_dict(values)


def presets(name: str, **changes: Any) -> KimiLinearConfig:
    """A configuration by name, with fields changed: "tiny", "demo", "small" or "48b".

    Raises:
        ValueError: No preset has this name, or a change makes the configuration invalid.
    """
    table = _preset_table()
    if name not in table:
        raise ValueError(f"there is no preset named {name!r}; there are {', '.join(table)}")
    return KimiLinearConfig.from_dict({**table[name], **changes})


def preset_names() -> tuple[str, ...]:
    """Names that :func:`presets` knows, from the smallest model to the largest."""
    return tuple(_preset_table())


def _preset_table() -> dict[str, dict[str, Any]]:
    return json.loads(Path(__file__).with_name("presets.json").read_text(encoding="utf-8"))


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    """``cls(**values)`` with sentences for unknown and missing keys."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values.keys() - fields.keys():
        close = difflib.get_close_matches(key, fields, n=1)
        hint = f"; did you mean {prefix}{close[0]}?" if close else ""
        raise ValueError(f"KimiLinearConfig: {prefix}{key} is not a known field{hint}")
    missing = [
        prefix + name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"KimiLinearConfig: {', '.join(missing)} missing")
    return cls(**values)


def _is_int(value: Any) -> bool:
    # What has more than 32 bits is a slip, and would overflow somewhere less telling.
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# By the annotations of the fields: the check, and what it wants.
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (_is_int, "an integer"),
    "float": (_is_number, "a number"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "str": (lambda value: isinstance(value, str), "a string"),
    "list[int]": (
        lambda value: isinstance(value, list | tuple) and all(map(_is_int, value)),
        "a list of integers",
    ),
}


def _type_problems(values: Any, prefix: str) -> list[str]:
    """A sentence for every field whose value is of another type than its annotation."""
    problems = []
    for field in dataclasses.fields(values):
        kind, _, nothing = field.type.partition(" | ")
        if kind not in _TYPES:  # linear_attn_config, a table of its own
            continue
        value = getattr(values, field.name)
        fits, wanted = _TYPES[kind]
        if not fits(value) and not (nothing and value is None):
            wanted = "a positive integer" if field.name in _SIZES else wanted
            problems.append(
                f"{prefix}{field.name} is {value!r}; it must be {wanted}"
                f"{', or null' if nothing else ''}"
            )
    return problems
