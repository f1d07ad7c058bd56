"""What the commands do, in reading order: build the objects of a config, run them, say what came out."""

import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from difftune.build import (
    build_data,
    build_model,
    build_module,
    build_tasks,
    build_tokenizer,
    build_trainer,
    fresh_architecture,
)
from difftune.checkpoints.compare import Difference
from difftune.checkpoints.convert import MAX_SHARD_BYTES, Conversion, convert_checkpoint
from difftune.checkpoints.export import ExportReport, export_model
from difftune.checkpoints.load import load_model
from difftune.config import Config, StageConfig
from difftune.config_text import to_yaml
from difftune.dry_run import dry_run_stage, report_size
from difftune.evaluation.generation import generate_texts
from difftune.modeling import DiffTransformerForCausalLM, count_parameters
from difftune.prepare import check_quickly, prepare_stages
from difftune.report.summary import accuracy_table
from difftune.run_folder import RunFolder, write_json, write_json_lines
from difftune.training.checkpoint_io import step_of
from difftune.training.preemption import Preemption

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
    tokenizer = build_tokenizer(config)
    if dry_run:
        _dry_run(config, tokenizer)
        return 0

    folder = RunFolder(config.run_dir)
    if _is_first_rank():
        folder.open(to_yaml(config), may_go_on=config.resume != "never")
        tokenizer.save_pretrained(folder.path / "tokenizer")
    stages = config.resolved_stages()
    model: DiffTransformerForCausalLM | None = None
    before: Path | None = None
    with Preemption() as preemption:
        for stage in stages:
            if folder.has_ended(stage.name, _end_of(stage)):
                log.info("stage %s has ended before: passed over", stage.name)
                model, before = None, folder.last_checkpoint(stage.name)
                continue
            if model is None:
                model = build_model(config.model, tokenizer, config.seed, start_from=before)
                counts = count_parameters(model)
                kind = model.config.attention
                _say(f"{kind}: {counts['total']:,} parameters, {counts['lambda']:,} of them lambda")
            _train(config, stage, folder, model, tokenizer, preemption)
            if preemption.exit_code is not None:
                log.warning("stopped by a signal; the same command goes on from here")
                return preemption.exit_code
    if _is_first_rank():
        _finish(config, folder, stages[-1].name, tokenizer)
    return 0


def prepare(config: Config, *, workers: int, teacher: bool, check: bool) -> None:
    """Tokenise the training data of every stage into its cache, and what was asked for besides.

    Args:
        config: What will be trained.
        workers: Processes that tokenise.
        teacher: Store the top k of each stage's teacher beside the tokens.
        check: Look at every row, forecast the run, and write `data_check.json` and its picture to the run folder.

    Raises:
        ValueError: If the data cannot be read, or a check finds them unfit; if `teacher` and no stage stores one.
    """
    _set_up_logging()
    prepare_stages(config, build_tokenizer(config), console, workers=workers, teacher=teacher, check=check)


def evaluate(config: Config, out: Path | None = None) -> dict[str, dict[str, Any]]:
    """Solve the problems of every task, print a table, and return the figures by task name.

    Args:
        config: With `model.path` and `evaluation`.
        out: Folder for `results.json` and `samples/TASK.jsonl`. None: nothing is written.
    """
    _set_up_logging()
    tasks = build_tasks(config.evaluation)
    model, tokenizer = _load_for_inference(config)
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
        table.add_row(
            task.name,
            f"{result.accuracy:.3f}",
            f"{low:.3f} to {high:.3f}",
            str(result.n),
            f"{result.truncated:.1%}",
            f"{result.unparsed:.1%}",
            f"{result.mean_length:.0f}",
            f"{seconds:.1f}",
        )
        if not result.complete:
            log.warning("%s: %d problems were not reached within the time limit", task.name, result.skipped)
        if out is not None:
            write_json_lines(out / "samples" / f"{task.name}.jsonl", [vars(sample) for sample in samples])
            write_json(out / "results.json", {"model": config.model.path, "tasks": results})
    console.print(table)
    return results


def generate(config: Config, prompts: list[str]) -> list[str]:
    """Print what a model answers to each prompt, as a user's turn of its chat template; return the answers."""
    _set_up_logging()
    model, tokenizer = _load_for_inference(config)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    encoded: Any = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)
    settings = config.evaluation
    answers = generate_texts(
        model,
        tokenizer,
        encoded["input_ids"],
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
    model, tokenizer = _load_for_inference(config, device="cpu")
    return _export(config, model, tokenizer, out, source=str(config.model.path), overwrite=False)


def convert(
    source: str,
    *,
    to: str,
    out: Path,
    text: Path | None = None,
    subln: str | None = None,
    lambda_init: float | None = None,
    dtype: str | None = None,
    max_shard_gb: float | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Convert a checkpoint to another kind or layout, and print how far the result is from it.

    Args:
        source: A folder, hub id, GGUF file or state dict file.
        to: One of `difftune.checkpoints.convert.TARGETS`.
        out: The folder to make.
        text: File to compare the losses on.
        subln: Sublayer norm where a softmax model becomes V1.
        lambda_init: Lambda at the start, for the same.
        dtype: Of the weights: float32, bfloat16, float16. None: as stored.
        max_shard_gb: Largest weight file, in 10^9 bytes.
        overwrite: Replace a model folder that is there.
    """
    _set_up_logging()
    names = ("float32", "bfloat16", "float16")
    if dtype is not None and dtype not in names:
        raise ValueError(f"dtype {dtype!r} is unknown: choose one of {', '.join(names)}")
    if max_shard_gb is not None and max_shard_gb <= 0:
        raise ValueError(f"the largest weight file must have more than 0 GB, got {max_shard_gb}")
    with console.status(f"converting {source}"):
        conversion = convert_checkpoint(
            source,
            to,
            out,
            subln=subln,
            lambda_init=lambda_init,
            text=text,
            dtype=None if dtype is None else getattr(torch, dtype),
            overwrite=overwrite,
            max_shard_bytes=MAX_SHARD_BYTES if max_shard_gb is None else int(max_shard_gb * 1e9),
        )
    console.print(_difference_table(conversion))
    _say(f"{conversion.path}: {conversion.method}")
    _say(f"{conversion.seconds:.0f} s, peak memory {conversion.peak_memory_gib:.1f} GiB")
    return conversion


def _train(
    config: Config,
    stage: StageConfig,
    folder: RunFolder,
    model: DiffTransformerForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    preemption: Preemption,
) -> None:
    """One stage, from its beginning or from where it was interrupted."""
    seed_everything(stage.seed, verbose=False)
    if stage.data.check:
        check_quickly(stage)
    data = build_data(stage, tokenizer, cache_dir=folder.path / "cache")
    _say(f"[bold]stage {stage.name}[/bold]\n{data.prepare().table()}")
    resume_from = folder.resume_point(stage.name, config.resume)
    if resume_from is not None:
        log.info("resuming from %s", resume_from)
    trainer = build_trainer(
        config,
        stage,
        folder,
        model,
        tokenizer,
        data,
        preemption,
        resume_step=None if resume_from is None else step_of(resume_from),
        console=console,
    )
    module = build_module(stage, model, data, tokenizer, trainer.world_size)
    trainer.fit(module, data, ckpt_path=resume_from)
    if preemption.exit_code is None and trainer.is_global_zero:
        folder.mark_ended(stage.name, trainer.global_step, _end_of(stage))


def _finish(config: Config, folder: RunFolder, stage: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Export what the last stage came to, and show the accuracies of all stages."""
    if config.export is not None:
        checkpoint = folder.finished_checkpoint(stage)
        source = f"{checkpoint.relative_to(folder.path)} of a difftune run"
        _export(config, load_model(checkpoint), tokenizer, folder.path / "export", source=source, overwrite=True)
    table = accuracy_table(folder.path)
    if table is not None:
        console.print(table)
    _say(f"run folder: {folder.path}")


def _export(
    config: Config,
    model: DiffTransformerForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    source: str,
    overwrite: bool,
) -> ExportReport:
    assert config.export is not None, "the command and the recipe set it"
    name = config.export.format
    if name == "auto":
        name = "diffllama" if model.config.attention == "diff_v1" else "difftune"
    report = export_model(model, tokenizer, out, name, verify=config.export.verify, overwrite=overwrite, source=source)
    _say(f"exported {report}")
    return report


def _difference_table(conversion: Conversion) -> Table:
    promise = "exact" if conversion.exact else "not exact"
    title = f"{conversion.source} to {conversion.target} ({promise}), both in float32"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for found in conversion.differences:
        table.add_column(found.inputs, justify="right")
    figures: dict[str, Callable[[Difference], str]] = {
        "tokens": lambda found: f"{found.tokens:,}",
        "largest difference of a logit": lambda found: f"{found.max_abs_logit:.2e}",
        "largest logit": lambda found: f"{found.logit_scale:.2f}",
        "mean KL, nats a token": lambda found: f"{found.kl:.2e}",
        "same most probable token": lambda found: f"{found.same_top:.2%}",
        "loss before, nats a token": lambda found: f"{found.nll_before:.4f}",
        "loss after": lambda found: f"{found.nll_after:.4f}",
    }
    for name, show in figures.items():
        table.add_row(name, *[show(found) for found in conversion.differences])
    return table


def _dry_run(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every stage, on one model; on the meta device if the model is too large for this machine."""
    too_large = False
    if config.model.path is None:
        architecture = fresh_architecture(config.model, tokenizer)
        too_large = report_size(console, architecture, getattr(torch, config.model.dtype))
    model = build_model(config.model, tokenizer, config.seed, device="meta" if too_large else "cpu")
    for stage in config.resolved_stages():
        stored = stage.distill.top_k is not None
        data = build_data(stage, tokenizer, cache_dir=Path(config.run_dir) / "cache" if stored else None)
        module = build_module(stage, model, data, tokenizer)
        dry_run_stage(console, stage.name, data, module, build_tasks(stage.evaluation))


def _load_for_inference(
    config: Config, device: str | None = None
) -> tuple[DiffTransformerForCausalLM, PreTrainedTokenizerBase]:
    assert config.model.path is not None, "checked with the config"
    dtype = getattr(torch, config.model.dtype)
    model = load_model(config.model.path, dtype=dtype, attention_backend=config.model.attention_backend)
    if device is None:
        wanted = config.trainer.accelerator
        device = {"gpu": "cuda", "auto": "cuda" if torch.cuda.is_available() else "cpu"}.get(wanted, wanted)
    model.to(device)  # type: ignore[arg-type]  # the wrapper of transformers' `to` hides its arguments
    return model, build_tokenizer(config)


def _end_of(stage: StageConfig) -> dict[str, Any]:
    """What ends a stage; with another end it goes on."""
    return {name: getattr(stage.trainer, name) for name in ("max_steps", "max_epochs", "max_time")}


def _set_up_logging() -> None:
    """Our messages to the terminal, once; those of the libraries only where they warn."""
    ours = logging.getLogger("difftune")
    if not ours.handlers:
        # Rich wraps lines to the width of the terminal; a file should keep them whole.
        to_terminal = RichHandler(console=console, show_path=False, show_time=False)
        ours.addHandler(to_terminal if console.is_terminal else logging.StreamHandler(sys.stdout))
        ours.setLevel(logging.INFO if _is_first_rank() else logging.WARNING)
        ours.propagate = False
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Batches are made by the stream: workers would only copy it.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning 2.6 with torch 2.13; nothing that a user could change.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    transformers_logging.disable_progress_bar()


def _is_first_rank() -> bool:
    # Lightning sets it when it is imported, from the environment of the launcher.
    return getattr(rank_zero_only, "rank", 0) == 0


def _say(text: str) -> None:
    if _is_first_rank():
        console.print(text, highlight=False, soft_wrap=True)
