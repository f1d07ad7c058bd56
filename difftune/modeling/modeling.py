"""DiffTransformerForCausalLM: a Llama-like decoder whose attention is differential (or softmax, the baseline)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from difftune.modeling.attention import AttentionContext, build_attention
from difftune.modeling.compat import CACHE, one_cache
from difftune.modeling.configuration import DiffTransformerConfig
from difftune.modeling.inputs import check_shard, count_positions, find_documents, key_padding_mask
from difftune.modeling.lambdas import LambdaV1
from difftune.modeling.layers import RMSNorm, SwiGLU, build_rotary
from difftune.modeling.outputs import DiffCausalLMOutput
from difftune.ops import ContextShard, Documents, linear_cross_entropy


class DecoderLayer(GradientCheckpointingLayer):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: DiffTransformerConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = build_attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Hidden states ``(B, T, C)`` to ``(B, T, C)``."""
        x = x + self.self_attn(self.input_layernorm(x), context)
        return x + self.mlp(self.post_attention_layernorm(x))


class DiffTransformerPreTrainedModel(PreTrainedModel):
    """What transformers wants to know of our models."""

    config_class = DiffTransformerConfig
    config: DiffTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules: list[str] | None = ["DecoderLayer"]
    _skip_keys_device_placement: list[str] | None = ["past_key_values", "cache"]
    _keep_in_fp32_modules_strict: list[str] | None = ["lambda_full"]
    # Backends are chosen by config.attention_backend; transformers' own dispatch is not used.
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LambdaV1):
            for parameter in module.parameters():
                init.normal_(parameter, mean=0.0, std=self.config.lambda_std_dev)
            for step in module.buffers():
                init.zeros_(step)


class DiffTransformerModel(DiffTransformerPreTrainedModel):
    """Embedding, layers and final norm.

    Args:
        config: The architecture.
    """

    def __init__(self, config: DiffTransformerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = build_rotary(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: torch.Tensor | Documents | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        shard: ContextShard | None = None,
        cache: Cache | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: torch.Tensor | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Hidden states after the final norm; arguments as :meth:`DiffTransformerForCausalLM.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = one_cache(cache, past_key_values)
        # With a mask, a cache or a shard, positions that begin anew are not those of packed documents.
        tells = attention_mask is None and cache is None and shard is None
        boundaries = (cu_seqlens, cu_seq_lens_q, cu_seq_lens_k, seq_idx)
        documents = find_documents(x, *boundaries, position_ids if tells else None)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if shard is not None:
            check_shard(shard, x, use_cache, attention_mask, position_ids, documents)
        if documents is not None or (self.gradient_checkpointing and self.training):
            if cache is not None:
                raise ValueError("a cache cannot be used with packed documents or gradient checkpointing")
            use_cache = False
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past = int(cache.get_seq_length()) if cache is not None else 0
        if position_ids is None:
            position_ids = count_positions(x, past, documents)
        wants = {
            name: getattr(self.config, name) if given is None else given
            for name, given in (
                ("output_attentions", output_attentions),
                ("output_hidden_states", output_hidden_states),
                ("return_dict", return_dict),
            )
        }
        maps: list[torch.Tensor] = []
        context = AttentionContext(
            rotary=self.rotary_emb(x, position_ids=position_ids),
            key_padding_mask=key_padding_mask(attention_mask, x.shape[0], x.shape[1], past),
            documents=documents,
            cache=cache,
            shard=shard,
            maps=maps if wants["output_attentions"] else None,
        )
        hidden_states: tuple[torch.Tensor, ...] = (x,)
        for layer in self.layers:
            x = layer(x, context)
            if wants["output_hidden_states"]:
                hidden_states += (x,)
        x = self.norm(x)
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            **{CACHE: cache},
            hidden_states=(*hidden_states[:-1], x) if wants["output_hidden_states"] else None,
            attentions=tuple(maps) if wants["output_attentions"] else None,
        )
        return output if wants["return_dict"] else output.to_tuple()


class DiffTransformerForCausalLM(DiffTransformerPreTrainedModel, GenerationMixin):
    """A Differential Transformer language model.

    Args:
        config: The architecture.

    Example:
        >>> config = DiffTransformerConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                                num_attention_heads=4)
        >>> DiffTransformerForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 32])
    """

    _tied_weights_keys: dict[str, str] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DiffTransformerConfig) -> None:
        super().__init__(config)
        self.model = DiffTransformerModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: torch.Tensor | Documents | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        z_loss: float = 0.0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        shard: ContextShard | None = None,
        cache: Cache | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: torch.Tensor | None = None,
    ) -> DiffCausalLMOutput | tuple[Any, ...]:
        """Run the model.

        Args:
            input_ids: Tokens, shape ``(B, T)``.
            attention_mask: 1 where a token is real, shape ``(B, past + T)``; masks of more axes are refused. Padding
                on the right costs nothing: the causal mask hides it.
            position_ids: Shape ``(B, T)``. Default: counted on from the cache, or from 0 in each document. Without a
                mask and a cache, packed documents begin where they do not count on.
            past_key_values: A transformers cache.
            inputs_embeds: Embeddings instead of tokens, shape ``(B, T, C)``.
            labels: Same positions as ``input_ids``, -100 where not learned, shape ``(B, T)``: the model shifts.
            use_cache: Whether to return a cache. Default: the config's, never with labels or documents.
            cu_seqlens: Cumulative lengths of packed documents over the flattened ``B * T`` tokens.
            logits_to_keep: Compute the logits of the last so many positions only, or of the positions in a tensor; 0
                is all.
            num_items_in_batch: Divide the loss by this count of label tokens instead of this batch's own.
            z_loss: Weight of the squared log-partition in the loss.
            output_attentions: Return the softmax maps of each layer, ``(B, num_attention_heads, T, S)``, from the
                equation: memory of T x S. Maps ``2h`` and ``2h + 1`` are the pair of differential head h, and what it
                attends by is the first minus lambda times the second.
            output_hidden_states: Return the hidden states after the embedding and each layer, the last normed.
            return_dict: False gives a tuple of what is not None. Default: the config's.
            shard: The part of longer rows that this process has. Then ``input_ids``, ``position_ids`` and ``labels``
                are those of its tokens, labels already shifted, since the next token may lie on another process;
                documents are in the shard, and there is no cache.
            cache: ``past_key_values`` by the name that transformers gives it from 5.24 on.
            cu_seq_lens_q: ``cu_seqlens`` by transformers' name; ``cu_seq_lens_k`` must be equal.
            cu_seq_lens_k: See there.
            max_length_q: Not needed: follows from the boundaries. So does ``max_length_k``.
            max_length_k: See there.
            seq_idx: Number of the document of each token, shape ``(B, T)``: another way to say where they begin.

        Returns:
            With labels: ``loss``, ``loss_sum``, ``num_label_tokens``; logits are computed if they are read, and never
            held whole otherwise. Without: ``logits`` of shape ``(B, T, V)``, and the cache.

        Raises:
            ValueError: If arguments exclude one another, or a mask does not fit.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False if labels is not None and use_cache is None else use_cache,
            cu_seqlens=cu_seqlens,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            shard=shard,
            cache=one_cache(cache, past_key_values),
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            seq_idx=seq_idx,
        )
        hidden = outputs.last_hidden_state
        common = {name: getattr(outputs, name) for name in (CACHE, "hidden_states", "attentions")}
        if labels is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            output = DiffCausalLMOutput(logits=self.lm_head(hidden[:, kept]), **common)
        else:
            targets = shift_labels(labels) if shard is None else labels
            loss_sum, count = linear_cross_entropy(hidden, self.lm_head.weight, targets, z_loss=z_loss)
            loss = loss_sum / (count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
            output = DiffCausalLMOutput(
                loss=loss, loss_sum=loss_sum, num_label_tokens=count, last_hidden_state=hidden, **common
            ).compute_logits_by(self.lm_head)
        if self.config.return_dict if return_dict is None else return_dict:
            return output
        if labels is None:
            return output.to_tuple()
        # In the order of transformers' models: a reader of a tuple cannot say later that it wants logits.
        rest = (value for name, value in output.items() if name in (CACHE, "hidden_states", "attentions"))
        return (output.loss, output.logits, *rest)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers; the cache by its older name, under which PEFT (0.21) looks for it to add a prefix."""
        mixin: Any = super()  # whose annotation of self no class of a model fits
        inputs: dict[str, Any] = mixin.prepare_inputs_for_generation(*args, **kwargs)
        if "cache" in inputs:
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs

    # `generate` reads transformers' own signature to see whether it may be given embeddings.
    functools.update_wrapper(prepare_inputs_for_generation, GenerationMixin.prepare_inputs_for_generation, assigned=())

    def generate_batch(self, *unused: Any, **options: Any) -> Any:
        """Refuse transformers' continuous batching, which calls attention kernels of one map a head.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"generate_batch (continuous batching) is not there for {self.config.attention} models of difftune: its "
            "paged cache and kernels hold one softmax map a head; call generate(), or difftune generate, on a batch"
        )

    init_continuous_batching = generate_batch
    continuous_batching_context_manager = generate_batch

    def extend_context(
        self, *, max_position_embeddings: int | None = None, rope_parameters: dict[str, Any] | None = None
    ) -> None:
        """Change how far and how the rotary embeddings reach; the weights stay, and the config says so.

        Args:
            max_position_embeddings: Longest sequence, in tokens. Default: unchanged.
            rope_parameters: As in the config. Default: unchanged. Where it does not say ``rope_theta``, the model keeps
                its own; ``original_max_position_embeddings``, for the forms that want it, is what the model had.

        Raises:
            ValueError: If the form is unknown, or lacks a number.
        """
        changed = self.config.to_dict()
        if rope_parameters is not None:
            had = {"rope_type": "default", "rope_theta": changed["rope_parameters"]["rope_theta"]}
            changed["rope_parameters"] = {**had, **rope_parameters}
            if changed["rope_parameters"]["rope_type"] in ("yarn", "llama3", "longrope"):
                # Of a model that was extended before, such as that of an earlier stage, where it began.
                key = "original_max_position_embeddings"
                original = (self.config.rope_parameters or {}).get(key, self.config.max_position_embeddings)
                changed["rope_parameters"].setdefault(key, original)
        if max_position_embeddings is not None:
            changed["max_position_embeddings"] = max_position_embeddings
        try:
            checked = type(self.config).from_dict(changed)
        except KeyError as error:  # how transformers says that a form lacks a number
            raise ValueError(f"rope_parameters {changed['rope_parameters']}: {error.args[0]}") from error
        self.config.rope_parameters = checked.rope_parameters
        self.config.max_position_embeddings = checked.max_position_embeddings
        self.model.rotary_emb = build_rotary(self.config).to(self.device)

    def warm_up_lambda(self, steps: int) -> None:
        """Begin a warm-up of lambda, in place: from almost 0 to its value over so many optimiser steps.

        Args:
            steps: 0 ends a warm-up, and lambda is whole at once.

        Raises:
            ValueError: If the model is not ``diff_v1``, or ``steps`` is negative.
        """
        if self.config.attention != "diff_v1" or steps < 0:
            raise ValueError(
                f"lambda_warmup_steps={steps} for a {self.config.attention} model: lambda of diff_v1 alone is warmed "
                "up, over 0 or more optimiser steps; leave it out"
            )
        self.config.lambda_warmup_steps = steps
        for module in self.modules():
            if isinstance(module, LambdaV1):
                module.warm_up(steps)

    def chunk_mlp(self, tokens: int | None) -> None:
        """Let the gated units take so many tokens at once, and again in the backward pass; None: all, once.

        Raises:
            ValueError: If ``tokens`` is below 1.
        """
        if tokens is not None and tokens < 1:
            raise ValueError(f"a gated unit takes at least 1 token at once, got {tokens}: raise it, or give None")
        for module in self.modules():
            if isinstance(module, SwiGLU):
                module.chunk = tokens

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **unused: Any) -> torch.Tensor | None:
        """Keep the 2-D mask: transformers would make a 4-D one for caches of fixed size, which hides the padding."""
        return attention_mask


def recompute_blocks(model: DiffTransformerForCausalLM, *, every: int = 1) -> None:
    """Recompute blocks in the backward pass instead of keeping their activations, in place.

    Args:
        model: The model.
        every: Of so many blocks the first is recomputed; 1 is all of them.
    """
    # transformers 5.23 renames it; 5.17 has the old name only.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for index, layer in enumerate(model.model.layers):
        layer.gradient_checkpointing = index % every == 0


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """Labels ``(B, T)`` moved to where they are predicted: ``t`` gets that of ``t + 1``, the last none (-100)."""
    return torch.cat((labels[:, 1:], labels.new_full((labels.shape[0], 1), -100)), dim=1)
