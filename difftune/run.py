"""Builds the objects from a config and runs them, in reading order: what the commands of the CLI do.

A run folder is the interface to everything that looks at a run later::

    config.yaml        the recipe, resolved: `difftune fit --config RUN/config.yaml` is the same run
    environment.json   versions, hardware, git commit of the last start
    metrics.jsonl      one object a line: step, tokens, name, value, stage, time
    tokenizer/         so that every checkpoint below can be evaluated
    checkpoints/STAGE/ step-*, best, and done.json once the stage has ended
    samples/           what was generated and how it was graded, STAGE-STEP.jsonl
    export/            the finished model
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from difftune.checkpoints.export import ExportReport, export_model
from difftune.checkpoints.load import load_model
from difftune.config import Config, DataConfig, EvaluationConfig, ModelConfig, StageConfig
from difftune.config_checks import task_name
from difftune.config_text import to_yaml
from difftune.data.datamodule import SFTDataModule
from difftune.data.problems import load_problems
from difftune.data.sources import Source
from difftune.data.tokenizers import build_tokenizer
from difftune.dry_run import dry_run_stage, report_size
from difftune.environment import describe_environment
from difftune.evaluation.callback import ScheduledEvaluation
from difftune.evaluation.generation import generate_texts
from difftune.evaluation.math import MathTask
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM, cast_weights, count_parameters
from difftune.report.summary import accuracy_table
from difftune.training.callbacks import LambdaMonitor, RichProgress, Throughput
from difftune.training.checkpoint import Checkpointing
from difftune.training.checkpoint_io import find_damage, find_resumable, list_checkpoints, step_of
from difftune.training.finetune import FinetuneModule
from difftune.training.flops import ModelFlops
from difftune.training.loggers import build_loggers
from difftune.training.preemption import Preemption
from difftune.training.strategies import build_strategy

log = logging.getLogger(__name__)
console = Console()


def fit(config: Config, *, dry_run: bool = False) -> int:
    """Train the stages of a config, each from the model that the one before left; export; show what came out.

    Called again for the same run folder it goes on: stages that have ended are passed over, the one that was
    interrupted resumes from its newest whole checkpoint.

    Args:
        config: What to train.
        dry_run: Build everything, take one step, show memory and a sample; write nothing.

    Returns:
        The exit code: 0, or 128 + the number of the signal that stopped the training.

    Raises:
        ValueError: If the config does not fit what is on disk: data, model, or an earlier run in the folder.
    """
    _set_up_logging()
    tokenizer = _build_tokenizer(config)
    stages = config.resolved_stages()
    if dry_run:
        model = _build_model(config.model, tokenizer, config.seed, allow_meta=True)
        for stage in stages:
            data = _build_data(stage, tokenizer, cache_dir=None)
            dry_run_stage(console, stage.name, data, _build_module(stage, model, data))
        return 0

    run_dir = Path(config.run_dir)
    _open_run(config, run_dir, tokenizer)
    model = None
    with Preemption() as preemption:
        for number, stage in enumerate(stages):
            checkpoints = run_dir / "checkpoints" / stage.name
            if _has_ended(stage, checkpoints):
                log.info("stage %s has ended before: passed over", stage.name)
                model = None
                continue
            if model is None:
                before = _last_checkpoint(run_dir, stages[number - 1]) if number else None
                model = _build_model(config.model, tokenizer, config.seed, start_from=before)
            _train(config, stage, run_dir, model, tokenizer, _resume_point(config, checkpoints), preemption)
            if preemption.exit_code is not None:
                log.warning("stopped by a signal; the same command goes on from here")
                return preemption.exit_code
    _finish(config, run_dir, stages[-1], tokenizer)
    return 0


def evaluate(config: Config, out: Path | None = None) -> dict[str, dict[str, Any]]:
    """Solve the problems of every task, print a table, and return the figures by task name.

    Args:
        config: With `model.path` and `evaluation`.
        out: Folder for `results.json` and `samples/TASK.jsonl`. None: nothing is written.
    """
    _set_up_logging()
    model, tokenizer = _load_for_inference(config)
    tasks = _build_tasks(config.evaluation)
    table = Table(title=f"accuracy of {config.model.path}", title_justify="left")
    for column in ("task", "accuracy", "95% interval", "n", "truncated", "unparsed", "mean tokens", "seconds"):
        table.add_column(column, justify="left" if column == "task" else "right")
    results: dict[str, dict[str, Any]] = {}
    limit = config.evaluation.time_limit_s
    for task in tasks:
        started = time.monotonic()
        with console.status(f"{task.name}: {len(task.problems)} problems"):
            samples = task.run(model, tokenizer, deadline=None if limit is None else started + limit / len(tasks))
        task.close()
        result = task.summarise(samples)
        seconds = time.monotonic() - started
        results[task.name] = {**result.to_dict(), "seconds": round(seconds, 2)}
        low, high = result.interval
        figures = (result.truncated, result.unparsed)
        table.add_row(
            task.name,
            f"{result.accuracy:.3f}",
            f"{low:.3f} to {high:.3f}",
            str(result.n),
            *(f"{share:.1%}" for share in figures),
            f"{result.mean_length:.0f}",
            f"{seconds:.1f}",
        )
        if not result.complete:
            log.warning("%s: %d problems were not reached within the time limit", task.name, result.skipped)
        if out is not None:
            _write_json_lines(out / "samples" / f"{task.name}.jsonl", [vars(sample) for sample in samples])
            _write_json(out / "results.json", {"model": config.model.path, "tasks": results})
    console.print(table)
    return results


def generate(config: Config, prompts: list[str]) -> list[str]:
    """Print what a model answers to each prompt, as a user's turn of its chat template; return the answers."""
    _set_up_logging()
    model, tokenizer = _load_for_inference(config)
    ids = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for prompt in prompts
    ]
    settings = config.evaluation
    answers = generate_texts(
        model,
        tokenizer,
        ids,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        console.print(prompt, style="dim", highlight=False, markup=False)
        console.print(answer.text, highlight=False, markup=False)
        if not answer.finished:
            log.warning("cut at --max-new-tokens %d", settings.max_new_tokens)
    return [answer.text for answer in answers]


def export(config: Config, out: Path) -> ExportReport:
    """Write the model of `model.path` to a new folder, in the format and with the check that `export` names."""
    _set_up_logging()
    assert config.export is not None, "the command sets it"
    model, tokenizer = _load_for_inference(config, device="cpu")
    report = export_model(
        model, tokenizer, out, _export_format(config, model), verify=config.export.verify, source=config.model.path
    )
    console.print(str(report), highlight=False, soft_wrap=True)
    return report


def _train(
    config: Config,
    stage: StageConfig,
    run_dir: Path,
    model: DiffTransformerForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    resume_from: Path | None,
    preemption: Preemption,
) -> None:
    """One stage: data, module, callbacks, Trainer; its last checkpoint and `done.json` at the end."""
    seed_everything(stage.seed, verbose=False)
    checkpoints = run_dir / "checkpoints" / stage.name
    data = _build_data(stage, tokenizer, cache_dir=run_dir / "cache")
    _say(f"[bold]stage {stage.name}[/bold]\n{data.prepare().table()}")
    resume_step = None if resume_from is None else step_of(resume_from)
    if resume_step is not None:
        log.info("resuming from %s", resume_from)

    checkpointing = Checkpointing(
        checkpoints,
        every_n_steps=stage.checkpoint.every_n_steps,
        keep_last=stage.checkpoint.keep_last,
        best_metric=stage.checkpoint.best_metric,
        best_mode=stage.checkpoint.best_mode,  # type: ignore[arg-type]  # the config allows max and min
    )
    callbacks = [Throughput(ModelFlops.of_model(model)), LambdaMonitor()]
    if config.logging.progress_bar:
        callbacks.append(RichProgress(stage.name, console=console))
    if stage.evaluation.tasks:
        tasks = _build_tasks(stage.evaluation)
        for task in tasks:
            _warn_of_contamination(task, data)
        settings = stage.evaluation
        callbacks.append(
            ScheduledEvaluation(
                tasks,
                tokenizer,
                samples_dir=run_dir / "samples",
                stage=stage.name,
                before=settings.before,
                at_end=settings.at_end,
                every_n_steps=settings.every_n_steps,
                every_n_tokens=settings.every_n_tokens,
                every_fraction=settings.every_fraction,
                total_steps=_total_steps(stage, data),
                time_limit_s=settings.time_limit_s,
                should_stop=preemption.is_preempted,
                on_result=checkpointing.on_evaluation,
            )
        )
    options = stage.trainer
    trainer = Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy=build_strategy(options.strategy),
        precision=options.precision,
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
            run_dir=run_dir,
            stage=stage.name,
            resume_step=resume_step,
            project=config.logging.project,
        ),
        callbacks=[*callbacks, preemption, checkpointing],
        enable_progress_bar=config.logging.progress_bar,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = _build_module(stage, model, data, trainer.world_size)
    trainer.fit(module, data, ckpt_path=resume_from)
    if preemption.exit_code is None and trainer.is_global_zero:
        _write_json(checkpoints / "done.json", {"step": trainer.global_step, **_end_of(stage)})


def _finish(config: Config, run_dir: Path, stage: StageConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Export the model of the last stage, and show the accuracies of all stages."""
    if rank_zero_only.rank:
        return
    if config.export is not None:
        folder = run_dir / "checkpoints" / stage.name
        best = folder / "best"
        source = best if stage.checkpoint.best_metric is not None and best.is_dir() else _last_checkpoint(run_dir, stage)
        model = load_model(source)
        report = export_model(
            model,
            tokenizer,
            run_dir / "export",
            _export_format(config, model),
            verify=config.export.verify,
            overwrite=True,
            source=f"{source.relative_to(run_dir)} of a difftune run",
        )
        console.print(f"exported {report}", highlight=False, soft_wrap=True)
    table = accuracy_table(run_dir)
    if table is not None:
        console.print(table)
    console.print(f"run folder: {run_dir}", highlight=False, soft_wrap=True)


def _build_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    if config.tokenizer is not None:
        return build_tokenizer(config.tokenizer)
    path = config.model.path
    assert path is not None, "checked with the config"
    # A checkpoint has no tokenizer of its own; that of its run lies above it.
    above = [folder / "tokenizer" for folder in Path(path).absolute().parents[:3]]
    own = (Path(path) / "tokenizer_config.json").is_file()
    return build_tokenizer(path if own else next((str(folder) for folder in above if folder.is_dir()), path))


def _build_model(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    start_from: Path | None = None,
    allow_meta: bool = False,
) -> DiffTransformerForCausalLM:
    """The model to train: from `start_from` (an earlier stage), from `config.path`, or fresh from `seed`."""
    architecture = config.architecture()
    dtype = getattr(torch, config.dtype)
    path = start_from or config.path
    if path is not None:
        model = load_model(path, dtype=dtype, attention_backend=config.attention_backend)
        context = {name: architecture[name] for name in ("max_position_embeddings", "rope_parameters") if name in architecture}
        if context:
            model.extend_context(**context)
    else:
        seed_everything(seed, verbose=False)
        architecture.setdefault("vocab_size", len(tokenizer))
        model_config = DiffTransformerConfig(
            **architecture,
            attention_backend=config.attention_backend,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        with torch.device("meta" if allow_meta and report_size(console, model_config, dtype) else "cpu"):
            model = DiffTransformerForCausalLM(model_config)
        cast_weights(model, dtype)
    if model.config.vocab_size < len(tokenizer):
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {model.config.vocab_size} rows: "
            "use the model's own tokenizer (leave out tokenizer), or set model.vocab_size for a fresh model"
        )
    if config.gradient_checkpointing:
        # transformers 5.23 renames it; 5.17 has the old name only.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    counts = count_parameters(model)
    _say(f"{model.config.attention}: {counts['total']:,} parameters, {counts['lambda']:,} of them lambda")
    return model


def _build_data(stage: StageConfig, tokenizer: PreTrainedTokenizerBase, cache_dir: Path | None) -> SFTDataModule:
    config: DataConfig = stage.data
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
    )


def _build_module(
    stage: StageConfig, model: DiffTransformerForCausalLM, data: SFTDataModule, world_size: int = 1
) -> FinetuneModule:
    options = vars(stage.optim) | {"betas": tuple(stage.optim.betas)}
    return FinetuneModule(model, total_steps=_total_steps(stage, data, world_size), **options)


def _build_tasks(config: EvaluationConfig) -> list[MathTask]:
    return [
        MathTask(
            name=task_name(task),
            problems=load_problems(task.path, task.limit, config.seed, options=task.options),
            max_new_tokens=task.max_new_tokens or config.max_new_tokens,
            batch_size=config.batch_size,
            temperature=config.temperature,
            top_p=config.top_p,
            num_samples=config.num_samples,
            seed=config.seed,
        )
        for task in config.tasks
    ]


def _load_for_inference(
    config: Config, device: str | None = None
) -> tuple[DiffTransformerForCausalLM, PreTrainedTokenizerBase]:
    assert config.model.path is not None, "checked with the config"
    model = load_model(
        config.model.path,
        dtype=getattr(torch, config.model.dtype),
        attention_backend=config.model.attention_backend,
    )
    if device is None:
        wanted = config.trainer.accelerator
        device = {"gpu": "cuda", "auto": "cuda" if torch.cuda.is_available() else "cpu"}.get(wanted, wanted)
    return model.to(device), _build_tokenizer(config)  # type: ignore[arg-type]


def _export_format(config: Config, model: DiffTransformerForCausalLM) -> str:
    assert config.export is not None
    return config.export.format


def _total_steps(stage: StageConfig, data: SFTDataModule, world_size: int = 1) -> int | None:
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


def _open_run(config: Config, run_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what describes the run, unless the folder holds another one."""
    if rank_zero_only.rank:
        return
    text = to_yaml(config)
    old = run_dir / "config.yaml"
    started = any((run_dir / "checkpoints").glob("*/step-*"))
    if started and config.resume == "never":
        raise ValueError(f"{run_dir} holds a run already, and resume is never: choose another run_dir, or resume=auto")
    if started and old.is_file():
        _check_same_model(old.read_text(encoding="utf-8"), text, run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    old.write_text(text, encoding="utf-8")
    _write_json(run_dir / "environment.json", describe_environment())
    tokenizer.save_pretrained(run_dir / "tokenizer")


def _check_same_model(before: str, now: str, run_dir: Path) -> None:
    import yaml

    old, new = yaml.safe_load(before), yaml.safe_load(now)
    for key in ("model", "tokenizer"):
        if old.get(key) != new.get(key):
            raise ValueError(
                f"{run_dir} holds a run with {key}={old.get(key)}, this one has {key}={new.get(key)}: checkpoints of the "
                "one cannot go on as the other; choose another run_dir"
            )


def _resume_point(config: Config, checkpoints: Path) -> Path | None:
    if config.resume in ("auto", "never"):
        return find_resumable(checkpoints)
    path = Path(config.resume)
    if path.parent.resolve() != checkpoints.resolve():
        return find_resumable(checkpoints)
    damage = find_damage(path)
    if damage:
        raise ValueError(f"resume={path}: {damage}; resume=auto finds the newest whole checkpoint")
    return path


def _end_of(stage: StageConfig) -> dict[str, Any]:
    return {name: getattr(stage.trainer, name) for name in ("max_steps", "max_epochs", "max_time")}


def _has_ended(stage: StageConfig, checkpoints: Path) -> bool:
    """Whether a stage ran to the end that it is given now; a later end means that it goes on."""
    done = checkpoints / "done.json"
    if not done.is_file():
        return False
    record = json.loads(done.read_text(encoding="utf-8"))
    return all(record[name] == value for name, value in _end_of(stage).items())


def _last_checkpoint(run_dir: Path, stage: StageConfig) -> Path:
    checkpoints = run_dir / "checkpoints" / stage.name
    last = find_resumable(checkpoints)
    if last is None:
        raise ValueError(f"{checkpoints} has no checkpoint to start from, although stage {stage.name} has ended")
    return last


def _set_up_logging() -> None:
    """Our messages to the terminal, once; those of the libraries only where they warn."""
    ours = logging.getLogger("difftune")
    if not ours.handlers:
        # Rich wraps lines to the width of the terminal; a file should keep them whole.
        to_terminal = RichHandler(console=console, show_path=False, show_time=False)
        ours.addHandler(to_terminal if console.is_terminal else logging.StreamHandler(sys.stdout))
        ours.setLevel(logging.WARNING if rank_zero_only.rank else logging.INFO)
        ours.propagate = False
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Batches are made by the stream: workers would only copy it.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning 2.6 with torch 2.13; nothing that a user could change.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    transformers_logging.disable_progress_bar()


def _say(text: str) -> None:
    if not rank_zero_only.rank:
        console.print(text, highlight=False, soft_wrap=True)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_json_lines(path: Path, values: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
