"""Configurations of Kimi Linear: the public ``config.json`` and two fields for residuals."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnres_ext.fields import Wanted, build, field, problems
from attnres_ext.residual_variants import MODES, VARIANTS

__all__ = ["KimiLinearConfig", "LinearAttentionConfig", "preset_names", "presets"]

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
    num_heads: int = field(least=1)
    head_dim: int = field(least=1)
    short_conv_kernel_size: int = field(4, least=1)
    gate_lower_bound: float | None = field(None, below=0)
    use_full_rank_gate: bool = False
    chunk_size: int = field(32, least=1)


@dataclass
class KimiLinearConfig:
    """Every choice that defines a model; what is no size defaults to Kimi-Linear-48B-A3B's.

    ``residual`` and ``sublayers_per_block`` are the two fields of ours: how sublayers are connected
    ("standard": sums; "block" and "full": attention over depth) and how many sublayers, attention
    and feed-forward each counting as one, a block sums up (None unless ``residual="block"``).
    """

    vocab_size: int = field(least=1)
    hidden_size: int = field(least=1)
    intermediate_size: int = field(least=1)
    num_hidden_layers: int = field(least=1)
    num_attention_heads: int = field(least=1)
    kv_lora_rank: int = field(least=1)
    qk_nope_head_dim: int = field(least=1)
    qk_rope_head_dim: int = field(least=0)
    v_head_dim: int = field(least=1)
    linear_attn_config: LinearAttentionConfig
    q_lora_rank: int | None = field(None, least=1)
    mla_use_output_gate: bool = False
    num_experts: int | None = field(None, least=1)
    num_experts_per_token: int = 8
    num_shared_experts: int = 1
    moe_intermediate_size: int | None = None
    moe_renormalize: bool = True
    routed_scaling_factor: float = 2.446
    first_k_dense_replace: int = 1
    rms_norm_eps: float = field(1e-5, above=0)
    initializer_range: float = field(0.02, least=0)
    tie_word_embeddings: bool = False
    model_max_length: int = field(1_048_576, least=1)
    residual: str = field("standard", one_of=MODES)
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
        wrong = problems(self) + problems(self.linear_attn_config, "linear_attn_config.")
        if not wrong:  # what relates fields to one another takes each of them for granted
            wrong = self._layer_problems() + self._expert_problems() + self._residual_problems()
        if wrong:
            raise ValueError("KimiLinearConfig: " + "; ".join(wrong))
        return self

    def _layer_problems(self) -> list[str]:
        linear = self.linear_attn_config
        kda, full, chunk = linear.kda_layers, linear.full_attn_layers, linear.chunk_size
        wrong = []
        if chunk & (chunk - 1):
            wrong.append(f"linear_attn_config.chunk_size is {chunk}, expected a power of two")
        if sorted([*kda, *full]) != list(range(1, self.num_hidden_layers + 1)):
            wrong.append(
                f"linear_attn_config has kda_layers {kda} and full_attn_layers {full}, expected "
                f"each of the layers 1 to {self.num_hidden_layers} (num_hidden_layers) once in both"
            )
        return wrong

    def _expert_problems(self) -> list[str]:
        if self.num_experts is None:
            return []
        ranges = {
            "num_experts_per_token": Wanted(int, least=1, most=self.num_experts),
            "moe_intermediate_size": Wanted(int, least=1),
            "num_shared_experts": Wanted(int, least=0),
            "first_k_dense_replace": Wanted(int, least=0),
        }
        found = (wanted.problem(name, getattr(self, name)) for name, wanted in ranges.items())
        return [f"{problem}, as num_experts is {self.num_experts}" for problem in found if problem]

    def _residual_problems(self) -> list[str]:
        if not VARIANTS[self.residual].sized:
            return []
        wanted = Wanted(int, least=1, most=self.num_sublayers)
        problem = wanted.problem("sublayers_per_block", self.sublayers_per_block)
        return [f"{problem}: the sublayers of the model, two a layer"] if problem else []

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
            whole = Wanted(int, least=1)
            if problem := whole.problem("attn_res_block_size", layers_per_block):
                raise ValueError(f"KimiLinearConfig: {problem}, of decoder layers")
            values = {"residual": "block", "sublayers_per_block": 2 * layers_per_block, **values}
        for key, supported in _FIXED.items():
            if (value := values.pop(key, supported)) != supported:
                raise ValueError(f"KimiLinearConfig: {key} is {value!r}, expected {supported!r}")
        try:
            linear = values.get("linear_attn_config")
            if isinstance(linear, dict):
                linear = build(LinearAttentionConfig, linear, "linear_attn_config.")
            elif not isinstance(linear, LinearAttentionConfig):
                raise ValueError(
                    f"linear_attn_config is {linear!r}, expected an object with kda_layers, "
                    "full_attn_layers, num_heads and head_dim"
                )
            config = build(cls, {**values, "linear_attn_config": linear})
        except ValueError as error:
            raise ValueError(f"KimiLinearConfig: {error}") from None
        return config.validate()

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
            raise ValueError(f"{path} holds a {type(values).__name__}, expected a JSON object")
        return cls.from_dict(values)


def presets(name: str, **changes: Any) -> KimiLinearConfig:
    """A configuration by name, with fields changed: "tiny", "demo", "small" or "48b".

    Raises:
        ValueError: No preset has this name, or a change makes the configuration invalid.
    """
    table = _preset_table()
    if name not in table:
        raise ValueError(f"presets: name is {name!r}, expected {Wanted(str, one_of=tuple(table))}")
    return KimiLinearConfig.from_dict({**table[name], **changes})


def preset_names() -> tuple[str, ...]:
    """Names that :func:`presets` knows, from the smallest model to the largest."""
    return tuple(_preset_table())


def _preset_table() -> dict[str, dict[str, Any]]:
    return json.loads(Path(__file__).with_name("presets.json").read_text(encoding="utf-8"))
