"""From a config to objects: tokenizer, model, data, module, tasks, Trainer."""

import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from difftune.build_distill import build_distill_module, teacher_settings
from difftune.build_scale import build_fresh_skeleton, build_stage_strategy, build_stored_skeleton
from difftune.checkpoints.adapters import describe_config, load_adapter, tokenizer_folder
from difftune.checkpoints.load import load_model, read_architecture
from difftune.checkpoints.sharded import StoredWeights, fill_model, weightless_projections
from difftune.config import Config, EvaluationConfig, ModelConfig, StageConfig
from difftune.config_checks import task_defaults
from difftune.data.datamodule import SFTDataModule
from difftune.data.sources import Source
from difftune.data.tokenizers import build_tokenizer as build_named_tokenizer
from difftune.data.upsampling import Upsampling
from difftune.evaluation.callback import ScheduledEvaluation
from difftune.evaluation.early_stop import Patience
from difftune.evaluation.math import MathTask
from difftune.evaluation.task import Task
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM, cast_weights
from difftune.modeling.adapter_settings import AdapterSettings
from difftune.modeling.adapters import add_adapter
from difftune.modeling.modeling import recompute_blocks
from difftune.modeling.quantized import quantize_base
from difftune.run_folder import RunFolder
from difftune.training.callbacks import LambdaMonitor, RichProgress, Throughput
from difftune.training.checkpoint import Checkpointing
from difftune.training.finetune import FinetuneModule
from difftune.training.flops import ModelFlops
from difftune.training.lambda_warmup import LambdaWarmup
from difftune.training.loggers import build_loggers
from difftune.training.preemption import Preemption

log = logging.getLogger(__name__)


def build_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer that the config names, else the one that belongs to `model.path`."""
    if config.tokenizer is not None:
        return build_named_tokenizer(config.tokenizer)
    assert config.model.path is not None, "checked with the config"
    return build_named_tokenizer(tokenizer_folder(config.model.path))


def fresh_architecture(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> DiffTransformerConfig:
    """The architecture of a fresh model, with the vocabulary and the special tokens of the tokenizer."""
    return DiffTransformerConfig(
        **{"vocab_size": len(tokenizer), **config.architecture()},
        attention_backend=config.attention_backend,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
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
    if model.config.vocab_size < len(tokenizer):
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {model.config.vocab_size} rows: "
            "use the model's own tokenizer (leave out tokenizer), or set model.vocab_size for a fresh model"
        )
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


def build_data(stage: StageConfig, tokenizer: PreTrainedTokenizerBase, cache_dir: Path | None) -> SFTDataModule:
    """The data of a stage; `cache_dir` is where tokens are kept unless the recipe says."""
    config = stage.data
    return SFTDataModule(
        tokenizer=tokenizer,
        train=[Source(**vars(source)) for source in config.train],
        seq_len=config.seq_len,
        micro_batch_size=config.micro_batch_size,
        packing=config.packing,
        overlong=config.overlong,
        shuffle=config.shuffle,
        seed=stage.seed,
        num_workers=config.num_workers,
        cache_dir=Path(config.cache_dir) if config.cache_dir else cache_dir,
        max_epochs=stage.trainer.max_epochs,
        accumulate_grad_batches=stage.trainer.accumulate_grad_batches,
        streaming=config.streaming,
        teacher=teacher_settings(stage),
        context_parallel_size=stage.trainer.context_parallel_size,
        upsampling=None if config.upsample is None else Upsampling(**vars(config.upsample), seed=stage.seed),
    )


def build_module(
    stage: StageConfig,
    model: DiffTransformerForCausalLM,
    data: SFTDataModule,
    tokenizer: PreTrainedTokenizerBase,
    world_size: int = 1,
    *,
    adapted: PeftModel | None = None,
) -> FinetuneModule:
    """The training module of a stage, whose schedule runs over the steps that the stage will take.

    Args:
        stage: The stage.
        model: To be trained.
        data: The stage's data.
        tokenizer: The student's, for a teacher to be compared with.
        world_size: Number of processes that have batches of their own, or share them as contexts. One alone, as in a
            dry run, has whole rows to itself.
        adapted: The model with its adapter, if it has one.
    """
    options = vars(stage.optim) | {"betas": tuple(stage.optim.betas)}
    options["adapter_config"] = None if adapted is None else describe_config(adapted)
    options["total_steps"] = total_steps(stage, data, world_size)
    if (weights := getattr(model, "weights_on_disk", None)) is not None:
        options["load_weights"] = partial(fill_model, weights=weights)
    if stage.distill.teacher is None:
        shared = stage.trainer.context_parallel_size if world_size > 1 else 1
        return FinetuneModule(model, context_parallel_size=shared, **options)
    return build_distill_module(stage, model, tokenizer, options)


def build_tasks(config: EvaluationConfig) -> list[Task[Any]]:
    """The tasks, with their data read."""
    defaults = task_defaults(config)
    return [task.build(defaults) for task in config.tasks]


def build_trainer(
    config: Config,
    stage: StageConfig,
    folder: RunFolder,
    model: DiffTransformerForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    data: SFTDataModule,
    preemption: Preemption,
    *,
    resume_step: int | None,
    console: Console,
) -> Trainer:
    """The Trainer of a stage, with its callbacks and loggers."""
    background = stage.checkpoint.background
    checkpointing = Checkpointing(
        folder.checkpoints(stage.name),
        every_n_steps=stage.checkpoint.every_n_steps,
        keep_last=stage.checkpoint.keep_last,
        best_metric=stage.checkpoint.best_metric,
        background=stage.trainer.strategy == "fsdp" if background is None else background,
        best_mode=stage.checkpoint.best_mode,  # type: ignore[arg-type]  # the config allows max and min
    )
    settings = stage.evaluation
    patience: Patience | None = None
    if settings.patience is not None:
        metric, mode = stage.checkpoint.best_metric, stage.checkpoint.best_mode
        assert metric is not None, "checked with the config"
        patience = Patience(metric, mode, settings.patience)  # type: ignore[arg-type]  # max or min

    def on_evaluation(trainer: Trainer, metrics: dict[str, float]) -> None:
        # Patience first: the checkpoint that is saved then holds its count.
        if patience is not None:
            patience.on_evaluation(trainer, metrics)
        checkpointing.on_evaluation(trainer, metrics)

    # Throughput comes first: its clock stops while those after it evaluate and save.
    callbacks: list[Callback] = [Throughput(ModelFlops.of_model(model)), LambdaMonitor(), LambdaWarmup()]
    if config.logging.progress_bar:
        callbacks.append(RichProgress(stage.name, console=console))
    callbacks += [patience] if patience is not None else []
    if settings.tasks:
        tasks = build_tasks(settings)
        for task in tasks:
            if isinstance(task, MathTask):
                _warn_of_contamination(task, data)
        callbacks.append(
            ScheduledEvaluation(
                tasks,
                tokenizer,
                samples_dir=folder.path / "samples",
                stage=stage.name,
                before=settings.before,
                at_end=settings.at_end,
                every_n_steps=settings.every_n_steps,
                every_n_tokens=settings.every_n_tokens,
                every_fraction=settings.every_fraction,
                total_steps=total_steps(stage, data),
                time_limit_s=settings.time_limit_s,
                should_stop=preemption.is_preempted,
                on_result=on_evaluation,
            )
        )
    options = stage.trainer
    return Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy=build_stage_strategy(stage),
        precision=options.precision,  # type: ignore[arg-type]  # the config allows four of Lightning's names
        max_steps=options.max_steps,
        # The data module holds the epochs: the Trainer sees one stream.
        max_epochs=1,
        max_time=options.max_time,
        accumulate_grad_batches=options.accumulate_grad_batches,
        gradient_clip_val=options.gradient_clip_val,
        log_every_n_steps=options.log_every_n_steps,
        deterministic=options.deterministic,
        logger=build_loggers(
            config.logging.loggers,
            run_dir=folder.path,
            stage=stage.name,
            resume_step=resume_step,
            project=config.logging.project,
        ),
        callbacks=[*callbacks, preemption, checkpointing],
        enable_progress_bar=config.logging.progress_bar,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def total_steps(stage: StageConfig, data: SFTDataModule, world_size: int = 1) -> int | None:
    """Optimiser steps of a stage, by whichever limit comes first; None if only time ends it."""
    limits = [stage.trainer.max_steps if stage.trainer.max_steps > 0 else None, data.total_steps(world_size)]
    return min((limit for limit in limits if limit is not None), default=None)


def _warn_of_contamination(task: MathTask, data: SFTDataModule) -> None:
    seen = data.seen(task.problems)
    if seen:
        log.warning(
            "%d of the %d problems of %s are also in the training data, such as %r: its accuracy is not that of "
            "unseen problems",
            len(seen),
            len(task.problems),
            task.name,
            seen[0].id,
        )
