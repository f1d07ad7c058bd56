"""Checks that look at more than one key of a config. All problems are returned, not only the first."""

import re
from collections import Counter
from pathlib import PurePath

from difftune.config import Config, DistillConfig, EvaluationConfig, StageConfig, TaskConfig

FIGURES = ("accuracy", "truncated", "unparsed", "mean_length")
"""Figures of a task by which checkpoints can be compared."""

_STAGE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_MAX_TIME = re.compile(r"\d+:\d\d:\d\d:\d\d")


def task_name(task: TaskConfig) -> str:
    """Name of a task in metrics and samples: its own, else the last part of its path without the ending."""
    return task.name or PurePath(task.path.replace(":", "/")).stem


def cross_field_problems(config: Config, command: str) -> list[str]:
    """Everything wrong with a config whose single values are right, as `key: what, and what to do`.

    Args:
        config: The config.
        command: `fit`, `prepare`, `evaluate`, `generate` or `export`.
    """
    stages = config.resolved_stages()
    problems = _model_problems(config)
    if command == "fit":
        problems += _name_problems([stage.name for stage in config.stages])
        for stage in stages:
            found = _stage_problems(config, stage) + _distill_problems(stage)
            found += _task_problems(stage.evaluation) + _metric_problems(stage)
            prefix = f"stage '{stage.name}': " if config.stages else ""
            problems += [prefix + text for text in found if prefix + text not in problems]
    elif command == "prepare":
        problems += [text for stage in stages for text in [*_data_problems(config, stage), *_distill_problems(stage)]]
    else:
        problems += _task_problems(config.evaluation)
        if config.model.path is None:
            problems.append(f"model.path: {command} needs a model; give --model DIR")
        if command == "evaluate" and not config.evaluation.tasks:
            problems.append("evaluation.tasks: nothing to evaluate; give --data FILE, or a recipe with tasks")
    return problems


def _model_problems(config: Config) -> list[str]:
    problems = []
    model = config.model
    if model.path is None and config.tokenizer is None:
        problems.append("tokenizer: a fresh model needs one (digits, bytes, a folder or a hub id); or set model.path")
    if model.path is not None:
        # Extending the context is the one change that weights survive.
        fixed = sorted(set(model.architecture()) - {"rope_parameters", "max_position_embeddings"})
        if fixed:
            problems.append(
                f"model.path: the architecture comes with the weights; leave out model.{', model.'.join(fixed)}"
            )
    if config.export is not None and config.export.format == "diffllama" and model.attention in ("diff_v2", "softmax"):
        problems.append(
            f"export.format: diffllama holds diff_v1 only, and model.attention is {model.attention};"
            " set export.format=difftune"
        )
    return problems


def _name_problems(names: list[str]) -> list[str]:
    problems = [
        f"stages: '{name}' cannot name a stage; use letters, digits, - and _, starting with a letter"
        for name in names
        if not _STAGE_NAME.fullmatch(name)
    ]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    return problems + [f"stages: the name '{name}' stands twice" for name in repeated]


def _stage_problems(config: Config, stage: StageConfig) -> list[str]:
    problems = _data_problems(config, stage)
    optim, trainer = stage.optim, stage.trainer
    if trainer.max_steps == 0:
        problems.append("trainer.max_steps: 0 trains nothing; use -1 for no limit, or the command evaluate")
    if trainer.max_steps == -1 and trainer.max_epochs is None and trainer.max_time is None:
        problems.append("trainer.max_steps: training would never end; set max_steps, max_epochs or max_time")
    if trainer.max_time is not None and not _MAX_TIME.fullmatch(trainer.max_time):
        problems.append(f"trainer.max_time: must be DD:HH:MM:SS, such as 00:08:00:00, got {trainer.max_time!r}")
    if trainer.precision == "16-mixed" and trainer.accelerator == "cpu":
        problems.append("trainer.precision: 16-mixed needs a GPU; use bf16-mixed or 32-true on the CPU")
    if 0 < trainer.max_steps <= optim.warmup_steps:
        problems.append(
            f"optim.warmup_steps: {optim.warmup_steps} must be less than trainer.max_steps, {trainer.max_steps}"
        )
    if optim.schedule == "constant" and optim.min_lr_ratio:
        problems.append("optim.min_lr_ratio: a constant schedule does not decay; leave it out, or set another schedule")
    return problems


def _data_problems(config: Config, stage: StageConfig) -> list[str]:
    problems = []
    if not stage.data.train:
        problems.append("data.train: nothing to train on; set data.train=[{path: FILE}]")
    longest = config.model.max_position_embeddings
    if longest is not None and stage.data.seq_len > longest:
        problems.append(f"data.seq_len: {stage.data.seq_len} is more than model.max_position_embeddings, {longest}")
    return problems


def _distill_problems(stage: StageConfig) -> list[str]:
    problems = []
    distill = stage.distill
    if distill.teacher is None and distill != DistillConfig():
        problems.append("distill.teacher: the other keys of distill do nothing without one; name it, or leave them out")
    if distill.divergence == "generalized_jsd" and distill.beta >= 1:
        problems.append(f"distill.beta: must be below 1, got {distill.beta:g}; the limit is reverse_kl")
    if bool(distill.align_weight) != bool(distill.align_steps):
        problems.append("distill.align_weight: works for align_steps steps; set both, or neither")
    if distill.align_weight and distill.top_k is not None:
        problems.append("distill.align_weight: needs the teacher in the process; leave out top_k")
    if distill.top_k is not None and stage.data.streaming:
        problems.append(
            "distill.top_k: a stored teacher belongs to a tokenised set, and data.streaming reads rows as they come; "
            "set data.streaming=false, or leave out top_k"
        )
    return problems


def _task_problems(evaluation: EvaluationConfig) -> list[str]:
    repeated = [name for name, count in Counter(map(task_name, evaluation.tasks)).items() if count > 1]
    problems = [f"evaluation.tasks: two tasks are named '{name}'; give each a name" for name in repeated]
    if evaluation.num_samples > 1 and evaluation.temperature == 0:
        problems.append(
            f"evaluation.num_samples: {evaluation.num_samples} greedy answers are all the same; set temperature above 0"
        )
    return problems


def _metric_problems(stage: StageConfig) -> list[str]:
    problems = []
    evaluation, best = stage.evaluation, stage.checkpoint.best_metric
    for period in ("every_n_steps", "every_n_tokens", "every_fraction"):
        if getattr(evaluation, period) is not None and not evaluation.tasks:
            problems.append(f"evaluation.{period}: there are no evaluation.tasks; name some, or set it to null")
    names = [task_name(task) for task in evaluation.tasks]
    if best is not None and best not in {f"eval/{name}/{figure}" for name in names for figure in FIGURES}:
        known = (
            f"one of {', '.join(f'eval/{name}/accuracy' for name in names)}" if names else "name some evaluation.tasks"
        )
        problems.append(f"checkpoint.best_metric: {best!r} is not measured; {known}, or set it to null")
    return problems
