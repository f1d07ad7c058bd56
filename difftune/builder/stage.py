"""From a stage of a recipe to what trains it: data, module, tasks, Trainer."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from difftune.builder.distill import build_distill_module, teacher_settings
from difftune.builder.scale import build_stage_strategy
from difftune.checkpoints.adapters import describe_config
from difftune.checkpoints.sharded import fill_model
from difftune.config import Config, EvaluationConfig, StageConfig
from difftune.config.checks import task_defaults
from difftune.config.recipe import DataConfig
from difftune.data.datamodule import SFTDataModule
from difftune.data.sources import Source
from difftune.data.upsampling import Upsampling
from difftune.evaluation.callback import ScheduledEvaluation
from difftune.evaluation.early_stop import Patience
from difftune.evaluation.math import MathTask
from difftune.evaluation.task import Task
from difftune.modeling import DiffTransformerForCausalLM
from difftune.run_folder import RunFolder
from difftune.training.callbacks import LambdaMonitor, RichProgress, Throughput
from difftune.training.checkpoint import Checkpointing
from difftune.training.finetune import FinetuneModule
from difftune.training.flops import ModelFlops
from difftune.training.lambda_warmup import LambdaWarmup
from difftune.training.loggers import build_loggers
from difftune.training.preemption import Preemption

log = logging.getLogger(__name__)


def build_sources(config: DataConfig) -> list[Source]:
    """Where the training rows of a stage come from."""
    return [Source(**vars(source), bad_rows=config.bad_rows) for source in config.train]


def build_data(
    stage: StageConfig, tokenizer: PreTrainedTokenizerBase, cache_dir: Path | None, *, keep_rows: bool = True
) -> SFTDataModule:
    """The data of a stage; `cache_dir` is where tokens, and rows if asked, are kept unless the recipe says."""
    config = stage.data
    return SFTDataModule(
        tokenizer=tokenizer,
        train=build_sources(config),
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
        keep_rows=keep_rows,
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
    progress = RichProgress(stage.name, console=console) if config.logging.progress_bar else None
    callbacks += [progress] if progress is not None else []
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
                time_limit_s=settings.time_limit_s,
                should_stop=preemption.is_preempted,
                on_result=on_evaluation,
                on_progress=None if progress is None else progress.note,
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
