"""From a recipe to its tokenizer, its model, and the adapter in it."""

import logging
from contextlib import nullcontext
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from difftune.builder.scale import build_fresh_skeleton, build_stored_skeleton
from difftune.checkpoints.adapter_config import tokenizer_folder
from difftune.checkpoints.adapters import load_adapter
from difftune.checkpoints.folders import could_be_hub_id, resolve_folder
from difftune.checkpoints.load import load_model, read_architecture
from difftune.checkpoints.sharded import StoredWeights, weightless_projections
from difftune.config import Config, ModelConfig
from difftune.data.tokenizers import build_tokenizer as build_named_tokenizer
from difftune.data.tokenizers import require_vocabulary
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM, cast_weights
from difftune.modeling.adapter_settings import AdapterSettings
from difftune.modeling.adapters import add_adapter
from difftune.modeling.modeling import recompute_blocks
from difftune.modeling.quantized import quantize_base
from difftune.modeling.rope_settings import KNOWN
from difftune.modeling.special_tokens import declare_special_tokens
from difftune.rendering import date_of_run, keep_date

log = logging.getLogger(__name__)


def build_tokenizer(config: Config, *, of_run: bool = False, write: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer that the config names, else the one of `model.path`; with the chat template that it names.

    Args:
        config: The whole recipe.
        of_run: A chat template that reads the clock reads one date in all of the run in `run_dir`.
        write: Write that date there if it is the first.
    """
    name = config.tokenizer
    if name is None:
        assert config.model.path is not None, "checked with the config"
        if not could_be_hub_id(config.model.path):
            # Else a model that is not there would be called a tokenizer that is not.
            resolve_folder(config.model.path)
        name = tokenizer_folder(config.model.path)
    run_dir = Path(config.run_dir)
    day = date_of_run(run_dir) if of_run else None
    tokenizer = build_named_tokenizer(name, chat_template=config.chat_template, template_date=day)
    if of_run and write:
        keep_date(tokenizer, run_dir)
    return tokenizer


def fresh_architecture(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> DiffTransformerConfig:
    """The architecture of a fresh model, with the vocabulary and the special tokens of the tokenizer."""
    _require_known(config)
    return DiffTransformerConfig(
        **{"vocab_size": len(tokenizer), **config.architecture()},
        attention_backend=config.attention_backend,
        # The row of a padding token is not learned, so one that means something else as well is none here.
        pad_token_id=None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _require_known(config: ModelConfig) -> None:
    """Refuse what transformers would only warn of in a log that nobody sees."""
    unknown = sorted(set(config.rope_parameters or {}) - set(KNOWN))
    if unknown:
        raise ValueError(
            f"model.rope_parameters: unknown key {', '.join(map(repr, unknown))}; known are {', '.join(KNOWN)}"
        )


def build_architecture(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> DiffTransformerConfig:
    """The architecture of the model to train, of which no weight is read."""
    return fresh_architecture(config, tokenizer) if config.path is None else read_architecture(config.path)


def build_model(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    start_from: Path | None = None,
    device: str = "cpu",
    sharded: bool = False,
) -> DiffTransformerForCausalLM:
    """The model to train.

    Args:
        config: Its section of the recipe.
        tokenizer: Its tokenizer.
        seed: Of the weights of a fresh model.
        start_from: Checkpoint of an earlier stage. None: `config.path`, else a fresh model.
        device: "meta" builds a fresh model without weights.
        sharded: Build it on the meta device; its attribute `weights_on_disk` fills it once it has been sharded.

    Raises:
        ValueError: If the tokenizer has more tokens than the model's embedding.
    """
    dtype = getattr(torch, config.dtype)
    path = start_from or config.path
    if path is not None:
        load = build_stored_skeleton if sharded else load_model
        model = load(path, dtype=dtype, attention_backend=config.attention_backend)
        given = config.architecture()
        context = {name: given[name] for name in ("max_position_embeddings", "rope_parameters") if name in given}
        if context:
            _require_known(config)
            model.extend_context(**context)
        # A later stage goes on with the warm-up that the first one began.
        if config.lambda_warmup_steps is not None and start_from is None:
            model.warm_up_lambda(config.lambda_warmup_steps)
    elif sharded:
        model = build_fresh_skeleton(fresh_architecture(config, tokenizer), dtype, seed)
    else:
        seed_everything(seed, verbose=False)
        with torch.device(device):
            model = DiffTransformerForCausalLM(fresh_architecture(config, tokenizer))
        cast_weights(model, dtype)
    require_vocabulary(tokenizer, model.config.vocab_size)
    declare_special_tokens(model, tokenizer)
    if config.quantization is not None:
        log.info("%s", quantize_base(model, config.quantization, compute_dtype=dtype))
    if config.gradient_checkpointing:
        recompute_blocks(model, every=config.gradient_checkpointing_every)
    model.chunk_mlp(config.mlp_chunk)
    return model


def build_adapter(
    config: Config, model: DiffTransformerForCausalLM, *, start_from: Path | None = None
) -> PeftModel | None:
    """Put the adapter that the config asks for inside the model and freeze the rest; None if it asks for none.

    Args:
        config: The whole recipe.
        model: The base; changed in place.
        start_from: Checkpoint of an earlier stage, whose adapter goes on. None: a new adapter.

    Raises:
        ValueError: If the settings do not fit the model, or the checkpoint belongs to another base.
    """
    if config.adapter is None:
        return None
    weights = getattr(model, "weights_on_disk", None)
    with weightless_projections(model, weights) if isinstance(weights, StoredWeights) else nullcontext():
        if start_from is not None:
            return load_adapter(model, start_from, trainable=True)
        seed_everything(config.seed, verbose=False)
        try:
            adapted = add_adapter(model, AdapterSettings(**vars(config.adapter)))
        except ValueError as error:
            raise ValueError(f"adapter: {error}") from error
    # Found again from wherever the adapter is loaded; a hub id stays one.
    path = Path(str(config.model.path)).expanduser()
    model.config._name_or_path = str(path.absolute()) if path.exists() else str(config.model.path)
    return adapted
