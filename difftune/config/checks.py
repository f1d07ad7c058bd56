"""Checks that look at more than one key of a config. All problems are returned, not only the first."""

import dataclasses
import re
from collections import Counter

from difftune.config.checks_scale import scale_problems
from difftune.config.distill import DistillConfig
from difftune.config.recipe import Config, EvaluationConfig, StageConfig
from difftune.tasks.base import Defaults
from difftune.tasks.math import MathTaskConfig

MEAN = "eval/mean/accuracy"
"""The unweighted mean of the accuracies of all tasks of the kind `math`."""

_SMALLEST_FRACTION = 1e-4
# They become names of files, with a step and an ending behind them.
_STAGE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,99}")
_TASK_NAME = re.compile(r"[\w-][\w.-]{0,99}")
_MAX_TIME = re.compile(r"[0-9]{1,5}:[0-9]{2}:[0-9]{2}:[0-9]{2}")


def task_defaults(evaluation: EvaluationConfig) -> Defaults:
    """What an evaluation says for those of its tasks that do not say it themselves."""
    return Defaults(**{f.name: getattr(evaluation, f.name) for f in dataclasses.fields(Defaults)})


def cross_field_problems(config: Config, command: str) -> list[str]:
    """Everything wrong with a config whose single values are right, as `key: what, and what to do`.

    Args:
        config: The config.
        command: `fit`, `prepare`, `plan`, `evaluate`, `generate` or `export`.
    """
    stages = config.resolved_stages()
    problems = _model_problems(config, command)
    if command == "fit":
        problems += scale_problems(config)
        problems += _name_problems([stage.name for stage in config.stages])
        for stage in stages:
            found = _stage_problems(config, stage) + _distill_problems(stage)
            found += _task_problems(stage.evaluation) + _metric_problems(stage)
            prefix = f"stage '{stage.name}': " if config.stages else ""
            problems += [prefix + text for text in found if prefix + text not in problems]
    elif command == "prepare":
        problems += [text for stage in stages for text in [*_data_problems(config, stage), *_distill_problems(stage)]]
    elif command != "plan":
        problems += _task_problems(config.evaluation)
        if config.model.path is None:
            problems.append(f"model.path: {command} needs a model; give --model DIR")
        if command == "evaluate" and not config.evaluation.tasks:
            problems.append("evaluation.tasks: nothing to evaluate; give --data FILE, or a recipe with tasks")
    return problems


def _model_problems(config: Config, command: str) -> list[str]:
    problems = []
    model = config.model
    if model.path is None and config.tokenizer is None and (command != "plan" or model.vocab_size is None):
        problems.append("tokenizer: a fresh model needs one (digits, bytes, a folder or a hub id); or set model.path")
    if model.path is not None:
        # A longer context and a slow start of lambda are the changes that weights survive.
        fixed = sorted(
            set(model.architecture()) - {"rope_parameters", "max_position_embeddings", "lambda_warmup_steps"}
        )
        if fixed:
            problems.append(
                f"model.path: the architecture comes with the weights; leave out model.{', model.'.join(fixed)}"
            )
    problems += _adapter_problems(config, command)
    if model.quantization is not None:
        problems += _quantization_problems(config, command)
    if config.export is not None and config.export.format == "diffllama" and model.attention in ("diff_v2", "softmax"):
        problems.append(
            f"export.format: diffllama holds diff_v1 only, and model.attention is {model.attention};"
            " set export.format=difftune"
        )
    return problems


def _adapter_problems(config: Config, command: str) -> list[str]:
    adapter = config.adapter
    if adapter is None:
        return []
    problems = []
    if config.model.path is None and command != "plan":
        problems.append("adapter: needs a base that is on disk, a fresh one would be saved nowhere; set model.path")
    if adapter.preset is not None and adapter.targets:
        problems.append(f"adapter.targets: {adapter.targets} and preset {adapter.preset} exclude one another; drop one")
    return problems


def _quantization_problems(config: Config, command: str) -> list[str]:
    kind = config.model.quantization
    if command == "export":
        return [f"model.quantization: export writes whole weights, not {kind}; leave it out"]
    if command not in ("fit", "plan"):
        return []
    problems = []
    if config.model.path is None and command == "fit":
        problems.append(f"model.quantization: {kind} of a fresh model keeps nothing that was learned; set model.path")
    if config.adapter is None:
        problems.append(f"model.quantization: {kind} weights are not trained themselves; set adapter, or leave it out")
    return problems


def _name_problems(names: list[str]) -> list[str]:
    problems = [
        f"stages: {name[:120]!r} cannot name a stage; use letters, digits, - and _, starting with a letter, "
        "at most 100 long"
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
    elif trainer.max_time is not None and not any(int(part) for part in trainer.max_time.split(":")):
        problems.append(f"trainer.max_time: {trainer.max_time} trains nothing; set a time, or null for no limit")
    if trainer.precision == "16-mixed" and trainer.accelerator == "cpu":
        problems.append("trainer.precision: 16-mixed needs a GPU; use bf16-mixed or 32-true on the CPU")
    if 0 < trainer.max_steps <= optim.warmup_steps:
        problems.append(
            f"optim.warmup_steps: {optim.warmup_steps} must be less than trainer.max_steps, {trainer.max_steps}"
        )
    if max(optim.betas) >= 1:
        problems.append(
            f"optim.betas: {optim.betas} must each be less than 1, or a moment would never change; set 0.999"
        )
    if optim.schedule == "constant" and optim.min_lr_ratio:
        problems.append("optim.min_lr_ratio: a constant schedule does not decay; leave it out, or set another schedule")
    shared = trainer.context_parallel_size
    if shared > 1 and stage.data.packing and stage.data.seq_len % (2 * shared):
        problems.append(
            f"data.seq_len: {stage.data.seq_len} must be a multiple of {2 * shared}, since "
            f"trainer.context_parallel_size={shared} devices share every row head and tail"
        )
    if shared > 1 and trainer.fsdp.tensor_parallel_size > 1:
        problems.append(
            "trainer.context_parallel_size: devices that share a layer (trainer.fsdp.tensor_parallel_size) need the "
            "same tokens; set one of the two to 1"
        )
    if shared > 1 and stage.distill.teacher is not None:
        problems.append(
            f"trainer.context_parallel_size: {shared} devices cannot share the rows that a teacher reads; set it to 1, "
            "or leave out distill.teacher"
        )
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
    if distill.on_policy_share and distill.top_k is not None:
        problems.append(
            "distill.on_policy_share: what the student will write is not known when a teacher is stored; leave out "
            "top_k, or set on_policy_share=0"
        )
    if distill.teacher is not None and stage.trainer.fsdp.tensor_parallel_size > 1:
        problems.append(
            "trainer.fsdp.tensor_parallel_size: divides the student's head, which is compared with the teacher's whole;"
            " set 1"
        )
    if distill.top_k is not None and stage.data.streaming:
        problems.append(
            "distill.top_k: a stored teacher belongs to a tokenised set, and data.streaming reads rows as they come; "
            "set data.streaming=false, or leave out top_k"
        )
    return problems


def _task_problems(evaluation: EvaluationConfig) -> list[str]:
    names = [task.task_name() for task in evaluation.tasks]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    problems = [f"evaluation.tasks: two tasks are named '{name}'; give each a name" for name in repeated]
    problems += [
        f"evaluation.tasks: {name[:120]!r} cannot name a task; use letters, digits, ., - and _, not starting with a "
        "dot, at most 100 long (mean is that of all)"
        for name in names
        if name == "mean" or not _TASK_NAME.fullmatch(name)
    ]
    for index, task in enumerate(evaluation.tasks):
        found = task.problems(task_defaults(evaluation))
        problems += [f"evaluation.tasks.{index}.{problem}" for problem in found]
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
    if evaluation.every_fraction is not None and evaluation.every_fraction < _SMALLEST_FRACTION:
        problems.append(
            f"evaluation.every_fraction: {evaluation.every_fraction:g} is more than {1 / _SMALLEST_FRACTION:,.0f} "
            "evaluations a stage; set a larger share"
        )
    if evaluation.patience is not None and best is None:
        problems.append("evaluation.patience: waits for a better checkpoint.best_metric; set that, or patience=null")
    measured = [[f"eval/{task.task_name()}/{figure}" for figure in task.figures()] for task in evaluation.tasks]
    means = [MEAN] if sum(isinstance(task, MathTaskConfig) for task in evaluation.tasks) > 1 else []
    if best is not None and best not in {*means, *(metric for metrics in measured for metric in metrics)}:
        shown = [*means, *(metrics[0] for metrics in measured)]
        known = f"one of {', '.join(shown)}" if shown else "name some evaluation.tasks"
        problems.append(f"checkpoint.best_metric: {best!r} is not measured; {known}, or set it to null")
    return problems
