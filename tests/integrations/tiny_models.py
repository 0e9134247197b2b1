"""Tiny models of the transformers library with weights that look trained; nothing is downloaded."""

import torch
import transformers

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Every expert is chosen, so that rounding cannot change the choice.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 24}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 4}
LATENT = {
    "kv_lora_rank": 12,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
}

#: Models whose layers are of the pre-norm shape, by model type.
FITTING = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},  # norms of queries and keys, inside of attention
    "qwen3_moe": EXPERTS,
    "olmo": {},  # LayerNorm without weights
    "phi": {},  # attention and MLP share one norm: one sublayer
    "phi3": {},
    "gemma": {"head_dim": 8},  # gains are 1 + weight
    "gemma2": {"head_dim": 8},  # a norm behind each sublayer, before the addition
    "gemma3_text": {"head_dim": 8},
    "granite": {"residual_multiplier": 0.22, "embedding_multiplier": 12.0},
    "starcoder2": {},  # LayerNorm with bias
    "stablelm": {},
    "nemotron": {},  # LayerNorm with a gain of 1 + weight
    "glm": {"head_dim": 8},
    "nanochat": {},  # its last norm is also its first, on the embedding
    "gpt2": {},
    "gpt_neox": {"use_parallel_residual": False},  # sublayer + stream, in this order
    "bloom": {},  # the addition is inside of the sublayer; layers return tuples
    "mamba": {"residual_in_fp32": False},  # one sublayer per layer
    "mixtral": LOCAL_EXPERTS,
    "gpt_oss": LOCAL_EXPERTS | {"head_dim": 8, "rope_scaling": None},
    "deepseek_v3": LATENT
    | {"n_routed_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 24}
    | {"first_k_dense_replace": 1},
    "kimi_linear": LATENT
    | {"num_local_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 24}
    | {"linear_head_dim": 8, "linear_num_heads": 4}
    | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    | {"mlp_layer_types": ["dense", "sparse", "sparse"], "initializer_range": 0.1},
}


def make(name: str, **changes) -> transformers.PreTrainedModel:
    """A causal language model of 3 layers of 32 in float32, in evaluation mode.

    Norms have random gains around 1, biases are not 0, matrices are large enough for every part to
    matter.
    """
    options = SIZES | FITTING.get(name, {}) | changes
    config = transformers.AutoConfig.for_model(name, **options)
    model = transformers.AutoModelForCausalLM.from_config(
        config, experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens(*shape: int) -> torch.Tensor:
    """Random token ids, none of them special."""
    return torch.randint(3, SIZES["vocab_size"], shape or (2, 11))


def randomise(residual) -> None:
    """Queries and key gains as training might leave them."""
    with torch.no_grad():
        for parameter in residual.parameters():
            parameter.normal_()


def assert_same(actual, expected) -> None:
    """Tensors, or tensors by name, of one function that is evaluated in two ways.

    Their matrix products belong to a library that promises no bits: its sums may depend on where
    operands lie, say. What a mistake of ours changes is changed by far more than a rounding.
    """
    if isinstance(expected, torch.Tensor):
        actual, expected = {"values": actual}, {"values": expected}
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert (actual[name] - tensor).norm() <= 1e-4 * tensor.norm(), name
