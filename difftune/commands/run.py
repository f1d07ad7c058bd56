"""What fit, prepare, evaluate, generate and export do, in reading order: build objects, run them, say what came out."""

import logging
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from difftune.builder import (
    build_adapter,
    build_architecture,
    build_data,
    build_model,
    build_module,
    build_tasks,
    build_tokenizer,
    build_trainer,
    fresh_architecture,
)
from difftune.builder.scale import is_sharded, num_parameters, settle_strategies, training_bytes
from difftune.checkpoints.adapters import load_with_base, save_trained_adapter
from difftune.checkpoints.export import ExportReport, auto_format, export_model
from difftune.checkpoints.load import load_model
from difftune.checkpoints.merge import merge_adapter
from difftune.commands.dry_run import dry_run_stage, report_size
from difftune.commands.evaluate import evaluate_tasks
from difftune.commands.prepare import check_quickly, prepare_stages
from difftune.commands.result_inputs import describe_inputs
from difftune.commands.stage_end import end_of, is_finished, require_training
from difftune.config import Config, StageConfig
from difftune.config.text import to_yaml
from difftune.data.tokenizers import require_vocabulary
from difftune.evaluation.generation import generate_texts
from difftune.left_behind import nothing_left_if_refused
from difftune.modeling import DiffTransformerForCausalLM, count_parameters
from difftune.modeling.adapters import describe_adapter
from difftune.modeling.quantized import quantize_base
from difftune.rendering import chat_ids, text_ids
from difftune.report.headline import headline_of, headline_text
from difftune.report.runs import load_run
from difftune.report.summary import accuracy_table
from difftune.result_folder import ResultFolder
from difftune.run_folder import RunFolder
from difftune.terminal import console, is_first_rank, say, set_up_logging
from difftune.training.checkpoint_io import step_of
from difftune.training.context_parallel import require_divisible
from difftune.training.devices import device_problem
from difftune.training.preemption import Preemption
from difftune.training.slurm import requeue_if_asked
from difftune.training.strategies import kind_of_device
from difftune.user_errors import naming

log = logging.getLogger(__name__)

_REWRITTEN = ("config.yaml", "environment.json", "tokenizer/*")
"""What every `fit` writes anew in its run folder."""


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
    set_up_logging()
    if dry_run:
        _dry_run(config, build_tokenizer(config, of_run=True, write=False))
        return 0
    folder = RunFolder(config.run_dir)
    folder.check_resume(config.resume)
    with folder.writing(is_first=is_first_rank()):
        tokenizer = build_tokenizer(config, of_run=True)
        recipe, config = config, settle_strategies(config, build_architecture(config.model, tokenizer))
        with nothing_left_if_refused(folder.path, keep="checkpoints/*/step-*", restore=_REWRITTEN):
            return _fit(recipe, config, tokenizer, folder)


def _fit(recipe: Config, config: Config, tokenizer: PreTrainedTokenizerBase, folder: RunFolder) -> int:
    """`fit` once every object that needs no data could be built."""
    if is_first_rank():
        with naming("run_dir"):
            folder.open(to_yaml(recipe), may_go_on=config.resume != "never")
        # Templates that an earlier start left there would come back as this tokenizer's.
        shutil.rmtree(folder.path / "tokenizer" / "additional_chat_templates", ignore_errors=True)
        tokenizer.save_pretrained(folder.path / "tokenizer")
    stages = config.resolved_stages()
    model: DiffTransformerForCausalLM | None = None
    adapted: PeftModel | None = None
    before: Path | None = None
    with Preemption() as preemption:
        for index, stage in enumerate(stages):
            if is_finished(folder, stages, index):
                log.info("stage %s has ended before: passed over", stage.name)
                model, before = None, folder.last_checkpoint(stage.name)
                continue
            if model is None:
                # With an adapter, a checkpoint holds the adapter alone.
                whole = before if config.adapter is None else None
                model = build_model(config.model, tokenizer, config.seed, start_from=whole, sharded=is_sharded(config))
                counts = count_parameters(model)
                kind = model.config.attention
                say(f"{kind}: {counts['total']:,} parameters, {counts['lambda']:,} of them lambda")
                adapted = build_adapter(config, model, start_from=before)
                if adapted is not None:
                    say(f"adapter: {describe_adapter(adapted)}")
            _train(config, stage, folder, model, adapted, tokenizer, preemption)
            if preemption.exit_code is not None:
                if is_first_rank():
                    log.warning("stopped by a signal; the same command goes on from here")
                    requeue_if_asked(preemption.exit_code - 128)
                return preemption.exit_code
    if is_first_rank():
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
    set_up_logging()
    # What is tokenised is worth keeping, whatever a later stage is refused for.
    folder = RunFolder(config.run_dir)
    with folder.writing(is_first=True), nothing_left_if_refused(folder.path, keep="cache/*/meta.json"):
        tokenizer = build_tokenizer(config, of_run=True)
        prepare_stages(config, tokenizer, console, workers=workers, teacher=teacher, check=check)


def evaluate(config: Config, out: Path | None = None, *, overwrite: bool = False) -> dict[str, dict[str, Any]]:
    """Run every task, print tables, and return the figures by task name.

    Args:
        config: With `model.path` and `evaluation`.
        out: Folder for `results.json`, `metrics.jsonl` and `samples/TASK.jsonl`, written while it works; what it holds
            already is not done again. None: nothing is written.
        overwrite: Measure anew what `out` holds.

    Raises:
        ValueError: If `out` holds results of another model, other data or other settings.
        SystemExit: With 128 + the number of the signal that stopped the work, once everything is written.
            With 1 if a task could not reach what it needs, such as a judge.
    """
    set_up_logging()
    if out is None:
        return _evaluate(config, None, overwrite=False)
    folder = ResultFolder(out)
    with folder.writing(is_first=is_first_rank()), nothing_left_if_refused(out, keep="samples/*"):
        return _evaluate(config, folder, overwrite=overwrite)


def _evaluate(config: Config, folder: ResultFolder | None, *, overwrite: bool) -> dict[str, dict[str, Any]]:
    """`evaluate` as the one writer of its folder."""
    assert config.model.path is not None, "checked with the config"
    with Preemption() as preemption:
        tasks = build_tasks(config.evaluation)
        model, tokenizer = _load_for_inference(config)
        if folder is not None:
            # With a model that can be loaded: what --overwrite removes is to be replaced.
            with naming("--out"):
                folder.open(describe_inputs(config, tasks, tokenizer), overwrite=overwrite)
        # The first Ctrl-C, too, lets what was generated be graded and written.
        with Preemption((signal.SIGINT,)) as interrupt:
            results = evaluate_tasks(
                console,
                tasks,
                model,
                tokenizer,
                label=config.model.path,
                folder=folder,
                time_limit_s=config.evaluation.time_limit_s,
                should_stop=lambda: preemption.is_preempted() or interrupt.is_preempted(),
            )
    exit_code = preemption.exit_code or interrupt.exit_code
    if exit_code is not None:
        log.warning("stopped by a signal; with --out the same command goes on from here")
        raise SystemExit(exit_code)
    failures = [f"{task.name}: {task.failure}" for task in tasks if task.failure]
    if failures:
        log.error("not all was evaluated: %s; with --out the same command measures the rest", "; ".join(failures))
        raise SystemExit(1)
    return results


def generate(config: Config, prompts: list[str], *, system: str | None = None, may_shorten: bool = False) -> list[str]:
    """Print what a model answers to each prompt, as a user's turn of its chat template if any; return the answers.

    Args:
        config: With `model.path`.
        prompts: What is asked, each in a chat of its own.
        system: A system turn before each of them.
        may_shorten: Whether `evaluation.max_new_tokens` is our default, and gives way where the context is shorter.

    Raises:
        ValueError: If there is a system turn and no chat template.
    """
    # Answers are what standard output is for.
    set_up_logging(to_stderr=True)
    model, tokenizer = _load_for_inference(config)
    if tokenizer.chat_template is None:
        if system is not None:
            raise ValueError(
                "--system needs a chat template, and the tokenizer has none: give --chat-template, or put the text "
                "into the prompt"
            )
        log.info("the tokenizer has no chat template: the model continues the prompts as text")
        encoded = [text_ids(tokenizer, prompt, "the prompt") for prompt in prompts]
    else:
        first = [] if system is None else [{"role": "system", "content": system}]
        chats = [[*first, {"role": "user", "content": prompt}] for prompt in prompts]
        encoded = [chat_ids(tokenizer, chat, "the prompt", add_generation_prompt=True) for chat in chats]
    settings = config.evaluation
    room = max(1, model.config.max_position_embeddings - max(map(len, encoded)))
    limit = min(settings.max_new_tokens, room) if may_shorten else settings.max_new_tokens
    answers = generate_texts(
        model,
        tokenizer,
        encoded,
        max_new_tokens=limit,
        batch_size=settings.batch_size,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        # The answer alone on standard output, as it is: what reads a pipe wants nothing else, and no wrapped lines.
        if console.is_terminal:
            console.print(prompt, style="dim", highlight=False, soft_wrap=True)
        console.print(answer.text, highlight=False, soft_wrap=True)
        if not answer.finished:
            print(f"cut at --max-new-tokens {limit}", file=sys.stderr)
    return [answer.text for answer in answers]


def export(config: Config, out: Path, *, overwrite: bool = False) -> ExportReport:
    """Write the model of `model.path` to a new folder, in the format and with the check that `export` names."""
    set_up_logging()
    model, tokenizer = _load_for_inference(config, device="cpu", as_stored=True)
    return _export(config, model, tokenizer, out, source=str(config.model.path), overwrite=overwrite)


def _train(
    config: Config,
    stage: StageConfig,
    folder: RunFolder,
    model: DiffTransformerForCausalLM,
    adapted: PeftModel | None,
    tokenizer: PreTrainedTokenizerBase,
    preemption: Preemption,
) -> None:
    """One stage, from its beginning or from where it was interrupted."""
    seed_everything(stage.seed, verbose=False)
    if stage.data.check:
        check_quickly(stage, config.resolved_stages())
    data = build_data(stage, tokenizer, cache_dir=folder.path / "cache")
    say(f"\n{data.prepare().table()}", heading=f"stage {stage.name}")
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
    require_divisible(stage.trainer.context_parallel_size, trainer.world_size)
    replicas = trainer.world_size // stage.trainer.fsdp.tensor_parallel_size
    module = build_module(stage, model, data, tokenizer, replicas, adapted=adapted)
    trainer.fit(module, data, ckpt_path=resume_from)
    if preemption.exit_code is None:
        require_training(stage.name, trainer.global_step, module.skipped_steps)
    if preemption.exit_code is None and trainer.is_global_zero:
        folder.mark_ended(stage.name, trainer.global_step, end_of(stage))


def _finish(config: Config, folder: RunFolder, stage: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Export what the last stage came to, and show the accuracies of all stages."""
    if config.export is not None:
        checkpoint = folder.finished_checkpoint(stage)
        source = f"{checkpoint.relative_to(folder.path)} of a difftune run"
        out = folder.path / "export"
        folder.clear_export()
        if config.adapter is not None and config.export.format == "auto":
            save_trained_adapter(checkpoint, out, tokenizer=tokenizer, overwrite=True)
            say(f"exported {out}: an adapter, in PEFT's format")
        else:
            model = _load_finished(checkpoint, is_adapter=config.adapter is not None)
            _export(config, model, tokenizer, out, source=source, overwrite=True)
        folder.list_export()
    headline = headline_text(headline_of(load_run(folder.path)))
    if headline:
        say(headline)
    table = accuracy_table(folder.path)
    if table is not None:
        console.print(table)
    say(f"run folder: {folder.path}")


def _load_finished(checkpoint: Path, *, is_adapter: bool) -> DiffTransformerForCausalLM:
    """The model of a checkpoint; an adapter is merged, and its logits compared."""
    if not is_adapter:
        return load_model(checkpoint)
    model, report = merge_adapter(load_with_base(checkpoint))
    say(str(report))
    return model


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
        name = auto_format(model.config)
    report = export_model(model, tokenizer, out, name, verify=config.export.verify, overwrite=overwrite, source=source)
    say(f"exported {report}")
    return report


def _dry_run(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every stage, on one model; on the meta device if the model is too large for this machine."""
    too_large = False
    if config.model.path is None:
        architecture = fresh_architecture(config.model, tokenizer)
        too_large = report_size(console, num_parameters(architecture), training_bytes(config, architecture))
    model = build_model(config.model, tokenizer, config.seed, device="meta" if too_large else "cpu")
    adapted = build_adapter(config, model)
    if adapted is not None:
        say(f"adapter: {describe_adapter(adapted)}")
    for stage in config.resolved_stages():
        stored = stage.distill.top_k is not None
        cache_dir = Path(config.run_dir) / "cache" if stored else None
        data = build_data(stage, tokenizer, cache_dir=cache_dir, keep_rows=False)
        module = build_module(stage, model, data, tokenizer, adapted=adapted)
        dry_run_stage(
            console,
            stage.name,
            data,
            module,
            build_tasks(stage.evaluation),
            precision=stage.trainer.precision,
            accelerator=stage.trainer.accelerator,
        )


def _load_for_inference(
    config: Config, device: str | None = None, *, as_stored: bool = False
) -> tuple[DiffTransformerForCausalLM, PreTrainedTokenizerBase]:
    assert config.model.path is not None, "checked with the config"
    dtype = getattr(torch, config.model.dtype)
    # float32 is the default: nobody gains by weights that are twice as large and say the same.
    stored = as_stored and dtype == torch.float32
    model = load_model(
        config.model.path, dtype=None if stored else dtype, attention_backend=config.model.attention_backend
    )
    if config.model.quantization is not None:
        log.info("%s", quantize_base(model, config.model.quantization, compute_dtype=dtype))
    if device is None:
        if (problem := device_problem(config.trainer.accelerator)) is not None:
            raise ValueError(problem)
        device = kind_of_device(config.trainer.accelerator)
    model.to(device)  # type: ignore[arg-type]  # the wrapper of transformers' `to` hides its arguments
    tokenizer = build_tokenizer(config)
    require_vocabulary(tokenizer, model.config.vocab_size)
    return model, tokenizer
