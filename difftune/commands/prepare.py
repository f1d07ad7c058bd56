"""What `difftune prepare` does: tokenise, check, forecast, store a teacher."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

from difftune.builder import (
    build_adapter,
    build_data,
    build_model,
    build_module,
    build_sources,
    total_steps,
)
from difftune.builder.distill import build_teacher, teacher_settings
from difftune.builder.held_out import held_out_problems
from difftune.commands.dry_run import StepCost, measure_step
from difftune.config import Config, StageConfig
from difftune.data.chat import Encoded, TeacherRows
from difftune.data.contamination import ProblemIndex
from difftune.data.datamodule import SFTDataModule
from difftune.data.doctor import QUICK_ROWS, Finding, examine, refuse_faults
from difftune.data.forecast import Forecast
from difftune.data.sources import Source
from difftune.data.teacher_store import store_teacher
from difftune.data.token_cache import cache_entry, content_hash, load_tokenized
from difftune.report.data_check import FILE_NAME, draw_data_check
from difftune.run_folder import write_json
from difftune.training.strategies import kind_of_device, named_devices

log = logging.getLogger(__name__)

_HISTOGRAM_BINS = 24


def check_quickly(stage: StageConfig, stages: Sequence[StageConfig]) -> None:
    """Look at the first rows of every source of a stage: faults are refused, the rest is warned of.

    Args:
        stage: Whose rows.
        stages: All of the recipe: the problems that any of them measures on are looked for in the rows.

    Raises:
        ValueError: If a source would be learned wrongly.
    """
    held_out = held_out_problems(one.evaluation for one in stages)
    for name, reason in held_out.unread.items():
        log.warning("the problems of %s were not looked for in the training data: %s", name, reason)
    tests = ProblemIndex(held_out.questions)
    reports = [examine(source, tests, limit=QUICK_ROWS) for source in build_sources(stage.data)]
    for report in reports:
        for finding in report.findings():
            if not finding.is_error:
                log.warning("%s, of its first %s rows: %s", report.source, f"{report.rows:,}", finding.text)
    refuse_faults(reports)


def prepare_stages(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    *,
    workers: int,
    teacher: bool,
    check: bool,
) -> None:
    """Every stage: see `difftune.commands.run.prepare`."""
    stages = config.resolved_stages()
    if teacher and not any(teacher_settings(stage) for stage in stages):
        raise ValueError("--teacher: no stage stores a teacher; set distill.teacher and distill.top_k")
    checks = []
    if check:
        held_out = held_out_problems([stage.evaluation for stage in stages], all_sets=True)
        tests = ProblemIndex(held_out.questions)
        console.print(held_out.text(tests), highlight=False, markup=False, soft_wrap=True)
    for stage in stages:
        console.rule(f"stage {stage.name}", align="left")
        cache_dir = Path(stage.data.cache_dir or Path(config.run_dir) / "cache")
        sources = build_sources(stage.data)
        if check:
            found = [examine(source, tests) for source in sources]
            for report in found:
                console.print(report.text(), highlight=False, markup=False, soft_wrap=True)
            # Before hours of tokenising what nobody should train on.
            refuse_faults(found)
        if not stage.data.streaming:
            for source in sources:
                _tokenize(source, tokenizer, cache_dir, workers, console)
        else:
            console.print("data.streaming=true: nothing is tokenised beforehand", highlight=False, soft_wrap=True)
        if teacher and teacher_settings(stage):
            _store_teacher(config, stage, tokenizer, sources, cache_dir, console)
        if check:
            checks.append(_check_tokens(config, stage, tokenizer, sources, cache_dir, console))
            checks[-1]["sources"] = [report.to_dict() for report in found]
        elif not stage.data.streaming and (teacher or not teacher_settings(stage)):
            # The check does this, too. What is stored of a teacher comes first.
            stats = build_data(stage, tokenizer, cache_dir).prepare()
            text = f"{stats.batch_rows:,} rows an epoch from {stats.kept:,} documents"
            console.print(f"{text}, {stats.padding_fraction:.1%} padding", highlight=False, soft_wrap=True)
    if check:
        path = Path(config.run_dir) / FILE_NAME
        sets = {
            "looked_for": {name: len(asked) for name, asked in held_out.questions.items()},
            "too_short": dict(tests.too_short),
            "unread": held_out.unread,
            "left_out": held_out.left_out,
        }
        write_json(path, {"stages": checks, "test_sets": sets})
        drawn = draw_data_check(path)
        console.print(f"wrote {path}" + (f" and {drawn}" if drawn else ""), highlight=False, soft_wrap=True)


def _tokenize(
    source: Source, tokenizer: PreTrainedTokenizerBase, cache_dir: Path, workers: int, console: Console
) -> None:
    with _progress(console, f"tokenising {source.path}", "rows", "tokens") as report:
        tokens = load_tokenized(source, tokenizer, cache_dir, workers=workers, progress=report)
    entry = cache_entry(source, tokenizer, cache_dir)
    console.print(
        f"{source.path}: {tokens.counts.rows_read:,} rows, {len(tokens):,} documents, {len(tokens.ids):,} tokens in "
        f"{entry} (content {content_hash(entry)[:16]})",
        highlight=False,
        soft_wrap=True,
    )


def _store_teacher(
    config: Config,
    stage: StageConfig,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[Source],
    cache_dir: Path,
    console: Console,
) -> None:
    settings = teacher_settings(stage)
    assert settings is not None, "asked for only where there is one"
    # The student's head decides how much of the teacher's vocabulary counts.
    vocab_size = build_model(config.model, tokenizer, config.seed, device="meta").config.vocab_size
    model = build_teacher(stage, tokenizer, vocab_size)
    model.to(torch.device(kind_of_device(stage.trainer.accelerator)))
    top_k = min(settings.top_k, vocab_size)
    if top_k < settings.top_k:
        raise ValueError(f"distill.top_k: {settings.top_k} is more than the {vocab_size} tokens of the vocabulary")

    def score(documents: Sequence[Encoded]) -> list[TeacherRows]:
        ids = [torch.from_numpy(np.array(document.ids, dtype=np.int64)) for document in documents]
        learned = [torch.from_numpy(np.array(document.learned)) for document in documents]
        found = model.score(ids, learned, top_k, settings.temperature)
        return [TeacherRows(*(part.cpu().numpy() for part in top)) for top in found]

    for source in sources:
        tokens = load_tokenized(source, tokenizer, cache_dir)
        with _progress(console, f"{settings.teacher} on {source.path}", "documents", "label tokens") as report:
            entry = store_teacher(tokens, source, tokenizer, cache_dir, settings, score, report)
        size = sum(file.stat().st_size for file in entry.iterdir())
        text = f"{source.path}: top {top_k} of {settings.teacher} in {entry}, {size / 2**20:,.1f} MiB"
        console.print(text, highlight=False, soft_wrap=True)


def _check_tokens(
    config: Config,
    stage: StageConfig,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[Source],
    cache_dir: Path,
    console: Console,
) -> dict[str, Any]:
    """Lengths, what is lost to them, ends, and the forecast."""
    data = build_data(stage, tokenizer, cache_dir)
    stats = data.prepare()
    console.print(stats.table(), highlight=False)
    if stage.data.streaming:
        lengths = data.document_lengths()
    else:
        # Those that are lost to seq_len, too.
        lengths = np.concatenate([load_tokenized(source, tokenizer, cache_dir).lengths for source in sources])
    counts, edges = np.histogram(
        lengths, bins=_HISTOGRAM_BINS, range=(0, max(stats.longest_row, stage.data.seq_len) + 1)
    )
    console.print(_bars(counts, edges, stage.data.seq_len), highlight=False, markup=False)
    findings = []
    if stats.eos_share < 1:
        findings.append(
            Finding(
                "no_eos",
                False,
                f"{1 - stats.eos_share:.1%} of the rows do not end in the end-of-text token, since they are cut at "
                f"seq_len={stats.seq_len}: they teach not to stop; set data.overlong=drop, or raise data.seq_len",
            )
        )
    if stats.unknown_tokens:
        text = f"{stats.unknown_tokens:,} tokens are unknown to the tokenizer: the model cannot see this text"
        findings.append(Finding("unknown_tokens", False, text))
    lost = sum(
        count for reason, count in stats.dropped.items() if reason.startswith(("longer than", "no label within"))
    )
    if lost:
        text = f"{lost:,} of {stats.rows_read:,} rows are lost to seq_len={stats.seq_len}"
        findings.append(Finding("lost_to_length", False, text))
    for finding in findings:
        console.print(f"  warning     {finding.text}", highlight=False, markup=False, soft_wrap=True)
    forecast = _forecast(config, stage, tokenizer, data)
    console.print(forecast.text(), highlight=False)
    return {
        "stage": stage.name,
        "seq_len": stage.data.seq_len,
        "statistics": stats.to_dict(),
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
        "token_findings": [vars(finding) for finding in findings],
        "forecast": {**vars(forecast), "hours": forecast.hours, "epochs": forecast.epochs},
    }


def _forecast(config: Config, stage: StageConfig, tokenizer: PreTrainedTokenizerBase, data: SFTDataModule) -> Forecast:
    trainer, stats = stage.trainer, data.stats
    devices = named_devices(trainer.accelerator, trainer.devices, trainer.num_nodes)
    # Devices that share each layer have the same rows.
    groups = max(1, devices // trainer.fsdp.tensor_parallel_size)
    width = stats.tokens / max(1 - stats.padding_fraction, 1e-9)
    tokens_a_row = width / max(1, stats.batch_rows)
    replicas = max(1, groups // trainer.context_parallel_size)
    rows = stage.data.micro_batch_size * replicas * trainer.accumulate_grad_batches
    cost = _cost(config, stage, tokenizer, data)
    return Forecast(
        tokens_an_epoch=round(width),
        label_tokens_an_epoch=stats.label_tokens,
        steps=total_steps(stage, data, groups),
        tokens_a_step=round(rows * tokens_a_row),
        tokens_per_s=None if cost is None else cost.tokens / cost.seconds,
        peak_memory_gib=None if cost is None else cost.peak_memory_gib,
        devices=devices,
        complete=stats.complete,
    )


def _cost(
    config: Config, stage: StageConfig, tokenizer: PreTrainedTokenizerBase, data: SFTDataModule
) -> StepCost | None:
    """What a micro-batch costs here; None, with the reason in the log, where that cannot be measured."""
    try:
        model = build_model(config.model, tokenizer, config.seed)
        adapted = build_adapter(config, model)
        module = build_module(stage, model, data, tokenizer, adapted=adapted)
        return measure_step(module, data, stage.trainer.accelerator, stage.trainer.precision)
    except (ValueError, RuntimeError, MemoryError) as error:
        log.warning("no speed was measured, since no step could be taken here: %s", error)
        return None


def _bars(counts: np.ndarray, edges: np.ndarray, seq_len: int, width: int = 40) -> str:
    """A histogram of document lengths as text; bars beyond `seq_len` are hollow."""
    top = max(1, int(counts.max(initial=0)))
    lines = ["tokens of a document"]
    for count, low, high in zip(counts.tolist(), edges.tolist(), edges.tolist()[1:], strict=False):
        bar = ("░" if low > seq_len else "█") * round(width * count / top)
        lines.append(f"{int(low):>8,} to {int(high):>8,}  {count:>9,}  {bar}")
    return "\n".join(lines)


@contextmanager
def _progress(console: Console, title: str, *units: str) -> Iterator[Callable[[int, int], None]]:
    """A line that counts two things while something is built."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def report(first: int, second: int) -> None:
            bar.update(task, description=f"{title}: {first:,} {units[0]}, {second:,} {units[1]}")

        yield report
