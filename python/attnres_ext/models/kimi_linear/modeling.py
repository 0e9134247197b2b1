"""Kimi Linear: KDA, MLA and mixtures of experts, connected by residuals of any kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.export
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnres_ext.cache import BlockCache
from attnres_ext.models.kimi_linear.configuration import KimiLinearConfig
from attnres_ext.models.kimi_linear.kda import KimiDeltaAttention, KimiDeltaState
from attnres_ext.models.kimi_linear.linear import Linear
from attnres_ext.models.kimi_linear.mla import KimiLatentState, KimiMLAAttention
from attnres_ext.models.kimi_linear.moe import KimiMLP, KimiRouter, KimiSparseMoE
from attnres_ext.models.kimi_linear.packing import Packing, Padding
from attnres_ext.residual import AttentionResiduals
from attnres_ext.residual_state import ResidualState
from attnres_ext.side_stream import new_stream

__all__ = [
    "KimiLinearForCausalLM",
    "KimiLinearModel",
    "KimiLinearOutput",
    "KimiLinearState",
    "embed",
    "next_token_loss",
    "update_router_bias",
]


@dataclass
class KimiLinearState:
    """What a decoder keeps between calls: made by ``new_state``, changed in place.

    Attributes:
        layers: One state a layer: the recurrent state of a KDA layer, the latent cache of an MLA
            layer.
        block_cache: Where one decoding step keeps its blocks; nothing in it outlives the step, only
            the memory does.
        prefill_cache: The same for as many tokens as :meth:`KimiLinearForCausalLM.prefill` takes at
            a time, while it runs.
        batch_size: Sequences.
        max_length: How many tokens fit.
        length: How many tokens it has seen.
        present: ``[B, max_length]``, bool: which of them are no padding; None if all are.
    """

    layers: list[KimiDeltaState | KimiLatentState]
    block_cache: BlockCache
    batch_size: int
    max_length: int
    length: int = 0
    present: Tensor | None = None
    prefill_cache: BlockCache | None = None

    def continued(self, padding: Padding | None, tokens: int) -> Padding | None:
        """The padding of so many tokens more and of all before them, which it keeps; if any."""
        if self.present is None:
            if padding is None:
                return None
            self.present = padding.present.new_ones(self.batch_size, self.max_length)
        end = self.length + tokens
        if padding is not None:
            self.present[:, self.length : end] = padding.present
        return Padding(self.present[:, self.length : end], self.present[:, :end])


@dataclass
class KimiLinearOutput:
    """What a forward pass returns.

    Attributes:
        logits: ``[B, T, vocab_size]``.
        loss: Mean cross entropy in nats, if labels were given.
        state: The decoding state that was passed in, moved on.
    """

    logits: Tensor
    loss: Tensor | None = None
    state: KimiLinearState | None = None


# What torch.export returns one of; with a decoding state there is nothing to export.
torch.export.register_dataclass(
    KimiLinearOutput, serialized_type_name="attnres_ext.models.kimi_linear.KimiLinearOutput"
)


class KimiDecoderLayer(nn.Module):
    """The two sublayers of a layer and their norms; the model's residual connects them.

    Attributes:
        attention_site: Where its attention reads.
        feed_forward_site: Where its feed-forward network reads.
    """

    def __init__(self, config: KimiLinearConfig, index: int) -> None:
        super().__init__()
        # Not computed with: a layer compiled by itself would get a graph for each number.
        self.attention_site, self.feed_forward_site = 2 * index, 2 * index + 1
        self.self_attn = (
            KimiDeltaAttention(config) if config.is_kda_layer(index) else KimiMLAAttention(config)
        )
        if config.is_moe_layer(index):
            self.block_sparse_moe = KimiSparseMoE(config)
        else:
            self.mlp = KimiMLP(
                config.hidden_size, config.intermediate_size, config.initializer_range
            )
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def reset_parameters(self) -> None:
        """Sublayers and norms, as each has it."""
        for part in self.children():
            part.reset_parameters()

    @property
    def feed_forward(self) -> nn.Module:
        """The feed-forward sublayer under whichever of its two names."""
        return self.block_sparse_moe if hasattr(self, "block_sparse_moe") else self.mlp

    def forward(
        self,
        x: Tensor,
        residual: ResidualState,
        state: KimiDeltaState | KimiLatentState | None = None,
        packing: Packing | Padding | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Both sublayers, each with its read and its write.

        Args:
            x: ``[B, T, D]``: the embedding, or what the layer before returned.
            residual: Where ``x`` waits to be read.
            state: What attention has seen, changed in place.
            packing: See :meth:`KimiLinearModel.forward`.
            recompute: Whether each sublayer is computed once more in the backward, with its read.

        Returns:
            What its feed-forward network wrote, ``[B, T, D]``, which waits in ``residual``.
        """
        residual.pass_on(x)
        step = partial(_checkpoint, _step) if recompute else _step
        attend = partial(self.self_attn, state=state, packing=packing)
        step(residual, self.attention_site, self.input_layernorm, attend)
        step(residual, self.feed_forward_site, self.post_attention_layernorm, self.feed_forward)
        return residual.pending


def _step(
    residual: ResidualState, site: int, norm: nn.RMSNorm, sublayer: Callable[[Tensor], Tensor]
) -> None:
    residual.write(sublayer(residual.read(site, norm.weight, norm.eps)))


# Sublayers draw no random numbers, so there is no generator's state to bring back.
_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class KimiLinearModel(nn.Module):
    """The backbone: token ids ``[B, T]`` to normalised hidden states ``[B, T, D]``.

    The residual reads are the norms: ``residual.read`` returns the mix over depth, already
    normalised for the sublayer.

    Attributes:
        checkpoint_sublayers: Whether a sublayer and its read keep nothing for the backward but the
            sum that is read last, and are computed once more (activation checkpointing). Same
            values, and no more memory than a standard residual needs.
    """

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        self.checkpoint_sublayers = False
        self.deviation = config.initializer_range
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            KimiDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.residual = AttentionResiduals(
            config.hidden_size,
            config.num_sublayers,
            mode=config.residual,
            sublayers_per_block=config.sublayers_per_block,
            eps=config.rms_norm_eps,
        )

    def reset_parameters(self) -> None:
        """Embeddings from N(0, initializer_range), the rest as each part has it."""
        nn.init.normal_(self.embed_tokens.weight, std=self.deviation)
        for part in (*self.layers, self.norm, self.residual):
            part.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        state: KimiLinearState | None = None,
        packing: Packing | Padding | None = None,
    ) -> Tensor:
        """Hidden states ``[B, T, D]`` of ``[B, T]`` tokens, continuing what ``state`` has seen.

        With a state they are in its memory: the next call may overwrite them. ``packing`` says
        where sequences lie in the rows, if each does not fill its own.
        """
        embedding = embed(self.embed_tokens, input_ids)
        residual = self.residual.start(embedding, cache=self._block_cache(embedding, state))
        recompute = self.checkpoint_sublayers and state is None and torch.is_grad_enabled()
        x = embedding
        for index, layer in enumerate(self.layers):
            layer_state = None if state is None else state.layers[index]
            x = layer(x, residual, layer_state, packing, recompute)
        residual.pass_on(x)
        return residual.read_output(self.norm.weight, self.norm.eps)

    def _block_cache(self, embedding: Tensor, state: KimiLinearState | None) -> BlockCache | None:
        if state is None:
            return None
        if embedding.shape == state.block_cache.shape:
            return state.block_cache
        if state.prefill_cache is not None:
            return state.prefill_cache.resized(embedding.shape[:-1])
        return self.new_block_cache(embedding.shape[:-1], embedding)

    def new_block_cache(self, shape: Sequence[int], like: Tensor) -> BlockCache:
        """A block cache for so many tokens, of the dtype and on the device of ``like``.

        The reads of a forward share one tensor for their results: a sublayer needs its input no
        longer than it runs. Phase 1 runs beside the sublayers where the device has streams.
        """
        return self.residual.new_cache(
            shape,
            dtype=like.dtype,
            device=like.device,
            side_stream=new_stream(like.device),
            reuse_result=True,
        )


# What cross_entropy leaves out of its mean.
_IGNORED = -100


def embed(table: nn.Embedding, input_ids: Tensor) -> Tensor:
    """Embeddings ``[B, T, D]`` of ``[B, T]`` tokens, in the dtype of the sums that begin with
    them."""
    embedding = table(input_ids)
    device = embedding.device.type
    if torch.is_autocast_enabled(device):
        # What sublayers write then is of autocast's dtype; so the sums are, as Kimi K3's.
        embedding = embedding.to(torch.get_autocast_dtype(device))
    return embedding


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy in nats of predicting each token from those before.

    Args:
        logits: ``[B, T, vocab_size]``.
        labels: ``[B, T]``: those of position ``t + 1`` are the target of position ``t``; -100 does
            not count.
    """
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
        labels[:, 1:].flatten(),
    )


@torch.no_grad()
def update_router_bias(
    model: nn.Module, rate: float = 1e-3, process_group: dist.ProcessGroup | None = None
) -> None:
    """Balances the experts' load; call it after each optimizer step (see ``moe.py``).

    Args:
        model: Where the routers are.
        rate: How far a bias moves.
        process_group: The processes that train replicas of this model on other tokens, all of
            which call this: their loads are added up, in one collective, so that biases stay
            the same. None where this process trains alone.
    """
    routers = [module for module in model.modules() if isinstance(module, KimiRouter)]
    if process_group is not None and routers:
        loads = torch.stack([router.load for router in routers])
        dist.all_reduce(loads, group=process_group)
        for router, load in zip(routers, loads, strict=True):
            router.load.copy_(load)
    for router in routers:
        router.update_bias(rate)


class KimiLinearForCausalLM(nn.Module):
    """Kimi Linear with its output head; parameters bear the public checkpoints' names.

    Args:
        config: Sizes and residual mode. Two models of one random seed that differ only in
            ``residual`` start from the same weights, and as pseudo-queries start at zero, from the
            same loss up to rounding and ``rms_norm_eps``.

    Raises:
        ValueError: The configuration is inconsistent; the message names the fields.
    """

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        self.config = config.validate()
        self.model = KimiLinearModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, config.initializer_range)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.reset_parameters()

    @property
    def residual(self) -> AttentionResiduals:
        """How the sublayers are connected, with the pseudo-queries."""
        return self.model.residual

    def reset_parameters(self) -> None:
        """Matrices from N(0, initializer_range), gains 1, pseudo-queries, router biases and counts
        0, decays as reported."""
        if self.lm_head.weight.is_meta:
            return
        self.model.reset_parameters()
        self.lm_head.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        state: KimiLinearState | None = None,
        logits_to_keep: int | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> KimiLinearOutput:
        """Predicts the token after each of ``input_ids``.

        Args:
            input_ids: ``[B, T]``, int64, ``T >= 1``.
            labels: ``[B, T]``: usually ``input_ids`` itself, for as everywhere in Hugging Face
                models the shift happens here: ``labels[:, t + 1]`` is the target of position ``t``.
                -100 marks positions that do not count.
            state: Decoding state: these tokens continue what it has seen, and it is moved on in
                place. Inference only.
            logits_to_keep: Logits of this many last tokens only; None is all.
            cu_seqlens: Where the sequences begin that ``input_ids`` ``[1, T]`` has packed into one
                row, and where the last ends: ``[sequences + 1]``, integers. They do not see each
                other, and no label reaches over an end. Not together with ``state``.
            attention_mask: ``[B, T]``: 1 for a token, 0 for padding, which no token sees and which
                neither is a target nor has one. None if there is none among these tokens.

        Raises:
            ValueError: Shapes that do not fit one another, or the state.
        """
        self._check(input_ids, labels, state, logits_to_keep)
        packing: Packing | Padding | None = None
        if attention_mask is not None:
            packing = Padding.of(attention_mask, input_ids.shape)
        if cu_seqlens is not None:
            if state is not None:
                raise ValueError("cu_seqlens: packed sequences cannot continue a decoding state")
            if attention_mask is not None:
                raise ValueError("cu_seqlens: packed rows have no padding, attention_mask is given")
            packing = Packing.of(cu_seqlens, input_ids.shape, input_ids.device)
        if state is not None:
            packing = state.continued(packing, input_ids.shape[1])
        # What is kept in the state is changed in place, which a backward pass could not survive.
        with torch.set_grad_enabled(torch.is_grad_enabled() and state is None):
            hidden = self.model(input_ids, state, packing)
            if logits_to_keep is not None:
                hidden = hidden[:, -logits_to_keep:]
            logits = self.lm_head(hidden)
        if state is not None:
            state.length += input_ids.shape[1]
        loss = None
        if labels is not None:
            if packing is not None:
                labels = labels.masked_fill(~packing.has_predecessor, _IGNORED)
            loss = next_token_loss(logits, labels)
        return KimiLinearOutput(logits, loss, state)

    def new_state(self, batch_size: int, max_length: int) -> KimiLinearState:
        """An empty decoding state with room for ``max_length`` tokens, prompt included."""
        if batch_size < 1 or max_length < 1:
            raise ValueError(
                f"new_state: batch_size is {batch_size} and max_length {max_length}; both must "
                "be at least 1"
            )
        weight = self.model.embed_tokens.weight
        layers = []
        for layer in self.model.layers:
            attention = layer.self_attn
            if isinstance(attention, KimiDeltaAttention):
                layers.append(attention.new_state(batch_size, weight.dtype, weight.device))
            else:
                layers.append(
                    attention.new_state(batch_size, max_length, weight.dtype, weight.device)
                )
        cache = self.model.new_block_cache((batch_size, 1), weight)
        return KimiLinearState(layers, cache, batch_size, max_length)

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        state: KimiLinearState,
        chunk_size: int,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Takes in a prompt, so many tokens of each sequence at a time.

        The blocks of all residual reads, ``num_blocks + 1`` tensors of the prompt's size when it is
        taken in at once, are of a chunk's size; the same memory serves every chunk.

        Args:
            input_ids: ``[B, T]``, ``T >= 1``.
            state: Moved on in place.
            chunk_size: Tokens of a sequence at a time, at least 1.
            attention_mask: ``[B, T]``, see :meth:`forward`.

        Returns:
            Logits after the last token, ``[B, vocab_size]``.

        Raises:
            ValueError: For a chunk size below one, or tokens that do not fit the state.
        """
        if chunk_size < 1:
            raise ValueError(f"prefill: chunk_size is {chunk_size}, expected at least 1")
        self._check(input_ids, None, state, None)
        batch_size, length = input_ids.shape
        state.prefill_cache = self.model.new_block_cache(
            (batch_size, min(chunk_size, length)), self.model.embed_tokens.weight
        )
        try:
            chunks = input_ids.split(chunk_size, dim=1)
            masks: Sequence[Tensor | None] = [None] * len(chunks)
            if attention_mask is not None:
                masks = Padding.of(attention_mask, input_ids.shape).present.split(chunk_size, dim=1)
            for chunk, mask in zip(chunks, masks, strict=True):
                logits = self(chunk, state=state, logits_to_keep=1, attention_mask=mask).logits
        finally:
            state.prefill_cache = None
        return logits[:, -1]

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        chunk_size: int = 4096,
        attention_mask: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Continues ``input_ids``, yielding each token as soon as it is known.

        Args:
            input_ids: The prompt, ``T >= 1``.
            max_new_tokens: How many tokens to yield; stop iterating to stop earlier.
            temperature: 0 takes the likeliest token, otherwise logits are divided by it and a token
                is drawn.
            generator: Source of randomness of the draws.
            chunk_size: How many tokens of each prompt are taken in at a time (see :meth:`prefill`).
            attention_mask: ``[B, T]``: 1 for a token, 0 for the padding at the left of shorter
                prompts; each is continued as it would be alone. None if all are of one length.

        Yields:
            One token per sequence, ``[B]``, int64.

        Raises:
            ValueError: An argument is not one of these.
        """
        if temperature < 0:
            raise ValueError(f"generate: temperature is {temperature}, expected at least 0")
        if max_new_tokens < 1:
            return
        self._check(input_ids, None, None, None)
        if attention_mask is not None:
            present = Padding.of(attention_mask, input_ids.shape).present
            if not (present[:, -1].all() and (present[:, 1:] >= present[:, :-1]).all()):
                raise ValueError(
                    "generate: attention_mask has padding behind a token; prompts that are "
                    "continued are padded at the left"
                )
        state = self.new_state(input_ids.shape[0], input_ids.shape[1] + max_new_tokens)
        logits = self.prefill(input_ids, state, chunk_size, attention_mask)
        for produced in range(1, max_new_tokens + 1):
            token = _draw(logits, temperature, generator)
            yield token
            if produced < max_new_tokens:
                with torch.no_grad():
                    logits = self(token.unsqueeze(-1), state=state).logits[:, -1]

    update_router_bias = update_router_bias

    def _check(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        state: KimiLinearState | None,
        logits_to_keep: int | None,
    ) -> None:
        if input_ids.dim() != 2 or input_ids.shape[1] < 1 or input_ids.shape[0] < 1:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}, expected [batch, tokens] with "
                "at least one each"
            )
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}, expected that of input_ids, "
                f"{tuple(input_ids.shape)}"
            )
        if labels is not None and input_ids.shape[1] < 2:
            raise ValueError("labels need at least two tokens: the target of one is the next")
        if labels is not None and logits_to_keep is not None:
            raise ValueError("labels need the logits of all tokens: leave logits_to_keep at None")
        if logits_to_keep is not None and logits_to_keep < 1:
            raise ValueError(
                f"logits_to_keep is {logits_to_keep}, expected at least 1, or None for all tokens"
            )
        if state is None:
            return
        if input_ids.shape[0] != state.batch_size:
            raise ValueError(
                f"input_ids has {input_ids.shape[0]} sequences; the state was made for "
                f"batch_size {state.batch_size}"
            )
        if state.length + input_ids.shape[1] > state.max_length:
            raise ValueError(
                f"the state has room for max_length {state.max_length} tokens and has seen "
                f"{state.length}; "
                f"{input_ids.shape[1]} more do not fit"
            )


def _draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One token per row of ``logits`` ``[B, vocab_size]``."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
