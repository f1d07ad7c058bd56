"""What scheduled evaluation costs: its share of the time of the quickstart's training.

python -m benchmarks.evaluation_share [--recipe recipes/quickstart.yaml] [--steps 60] [--threads 2] [overrides ...]

Each stage is trained for some steps as `difftune fit` trains it, which gives the time of a step; then its scheduled
evaluation is run once. The share is what all evaluations of the recipe take, over that and all of its steps. A model
after so few steps writes every answer to its limit, so the evaluation is the longest that it can be.

Leaves with code 1 unless all evaluations together take less than 10% of the time.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from benchmarks.common import ROOT, machine, ratio, table
from difftune.builder import build_data, build_model, build_module, build_tasks, build_tokenizer, total_steps
from difftune.config import load_config
from difftune.terminal import set_up_logging

LIMIT = 0.10


class _Clock(Callback):
    """When each optimiser step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(time.perf_counter())


def missed_limit(evaluation_s: float, training_s: float) -> str:
    """What is said where evaluations take `LIMIT` of all the time or more; empty where they do not."""
    share = ratio(evaluation_s, evaluation_s + training_s)
    # NaN, of no time at all, misses too.
    return (
        "" if share < LIMIT else f"scheduled evaluation takes {share:.1%} of the time, under {LIMIT:.0%} are required"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "quickstart.yaml")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    set_up_logging()
    config = load_config(args.recipe, args.overrides)
    tokenizer = build_tokenizer(config)
    rows: list[list[str]] = []
    evaluation_s = training_s = 0.0
    for stage in config.resolved_stages():
        seed_everything(stage.seed, verbose=False)
        model = build_model(config.model, tokenizer, config.seed)
        with tempfile.TemporaryDirectory() as folder:
            data = build_data(stage, tokenizer, cache_dir=Path(folder))
            data.prepare()
            clock = _Clock()
            trainer = Trainer(
                accelerator="cpu",
                devices=1,
                max_steps=args.steps,
                accumulate_grad_batches=stage.trainer.accumulate_grad_batches,
                gradient_clip_val=stage.trainer.gradient_clip_val,
                callbacks=[clock],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
            )
            trainer.fit(build_module(stage, model, data, tokenizer), data)
            steps = total_steps(stage, data)
        assert steps is not None, "the recipe says when a stage ends"
        # The first steps allocate.
        ends = clock.ends[len(clock.ends) // 4 :]
        step_s = statistics.median(b - a for a, b in itertools.pairwise(ends))
        tasks = build_tasks(stage.evaluation)
        begun = time.perf_counter()
        for task in tasks:
            task.summarise(task.run(model, tokenizer, part=(0, 1), should_stop=None, deadline=None))
        one_s = time.perf_counter() - begun
        for task in tasks:
            task.close()
        count = _evaluations(stage.evaluation, steps)
        evaluation_s, training_s = evaluation_s + count * one_s, training_s + steps * step_s
        share = ratio(count * one_s, count * one_s + steps * step_s)
        items = sum(task.num_items for task in tasks)
        rows.append(
            [stage.name, f"{steps} x {step_s:.3f}", f"{count} x {one_s:.2f} ({items} problems)", f"{share:.1%}"]
        )
    rows.append(
        ["all", f"{training_s:.0f}", f"{evaluation_s:.0f}", f"{ratio(evaluation_s, evaluation_s + training_s):.1%}"]
    )
    print(f"Scheduled evaluation of {args.recipe.name}; median step of {args.steps}; {machine(args.threads)}\n")
    print(table(["stage", "training, s", "evaluation, s", "share of the time"], rows))
    missed = missed_limit(evaluation_s, training_s)
    if missed:
        print(missed)
    return 1 if missed else 0


def _evaluations(settings: Any, steps: int) -> int:
    """How many evaluations a stage of so many steps has."""
    if settings.every_n_tokens is not None:
        raise SystemExit("this benchmark counts evaluations by steps and shares, not by tokens")
    at = {0} if settings.before else set()
    at |= {steps} if settings.at_end else set()
    if settings.every_n_steps is not None:
        at |= set(range(settings.every_n_steps, steps + 1, settings.every_n_steps))
    if settings.every_fraction is not None:
        at |= {
            round(k * settings.every_fraction * steps) for k in range(1, int(1 / settings.every_fraction + 1e-9) + 1)
        }
    return len(at)


if __name__ == "__main__":
    sys.exit(main())
