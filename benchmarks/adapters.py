"""How much of what full fine-tuning gains an adapter gains: accuracy on held-out problems, same start, data and steps.

python -m benchmarks.adapters [--start runs/quickstart/export] [--steps 2400] [--presets attention,negative_branch,...]

Each row is a run of recipes/quickstart_lora.yaml: chains of four numbers, for a model that knows two and three.
Leaves with code 1 if `attention` gains less than 0.9 of what the whole model gains.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, machine, report, run_child, table

RECIPE = ROOT / "recipes" / "quickstart_lora.yaml"
PRESETS = ("attention", "all_linear", "negative_branch", "lambda_only")
FULL = "full"
REQUIRED = 0.9
# Peak rates that are not the recipe's.
RATES = {FULL: 1e-3, "lambda_only": 3e-2}


def child(way: str, start: str, steps: int, problems: int, out: str, rate: float | None) -> None:
    """Train one way and give the accuracies back."""
    from difftune.commands import run
    from difftune.config import load_config
    from difftune.report.summary import accuracies

    rate = rate or RATES.get(way)
    overrides = [
        f"model.path={start}",
        f"run_dir={out}",
        f"trainer.max_steps={steps}",
        f"optim.warmup_steps={min(50, steps // 2)}",
        f"evaluation.tasks.*.limit={problems}",
        f"evaluation.batch_size={problems}",
        "evaluation.every_fraction=null",
        "checkpoint.every_n_steps=null",
        "logging.progress_bar=false",
        "logging.loggers=[jsonl]",
        "adapter=null" if way == FULL else f"adapter.preset={way}",
        *([] if rate is None else [f"optim.lr={rate}"]),
    ]
    config = load_config(RECIPE, overrides)
    assert run.fit(config) == 0
    before, after = accuracies(Path(out))
    report(before=before, after=after, trained=_trained(Path(out), way), rate=config.optim.lr)


def _trained(out: Path, way: str) -> int:
    """Parameters that were trained."""
    from difftune.checkpoints.adapters import load_with_base
    from difftune.checkpoints.load import load_model
    from difftune.modeling import count_parameters
    from difftune.modeling.adapters import count_adapter_parameters

    if way == FULL:
        return count_parameters(load_model(out / "export"))["total"]
    return count_adapter_parameters(load_with_base(out / "export"))["trainable"]


def row(name: str, found: dict[str, Any], trained: str, rate: str, share: str) -> list[str]:
    interval = f"{found['accuracy_low']:.3f} to {found['accuracy_high']:.3f}"
    return [name, trained, rate, f"{found['accuracy']:.3f}", interval, share]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", default=str(ROOT / "runs" / "quickstart" / "export"))
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--rate", type=float, default=None, help="peak learning rate of every way, for trials")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args.child, args.start, args.steps, args.problems, args.out, args.rate)
        return 0
    if not Path(args.start).is_dir():
        raise SystemExit(f"{args.start} is not there: run `make quickstart` first, or give --start MODEL")
    presets = args.presets.split(",")
    if unknown := set(presets) - set(PRESETS):
        raise SystemExit(f"no such preset: {', '.join(sorted(unknown))}; there are {', '.join(PRESETS)}")

    shared = [f"--start={Path(args.start).absolute()}", f"--steps={args.steps}", f"--problems={args.problems}"]
    shared += [] if args.rate is None else [f"--rate={args.rate}"]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in (FULL, *presets):
            arguments = [f"--child={way}", f"--out={folder}/{way}", *shared]
            results[way] = run_child("benchmarks.adapters", arguments, args.threads, timeout_s=4 * 3600)
    start = results[FULL]["before"]
    gain = results[FULL]["after"]["accuracy"] - start["accuracy"]
    rows, shares = [row("start", start, "", "", "")], {}
    for way, found in results.items():
        assert found["before"]["accuracy"] == start["accuracy"], "all ways start from one model"
        shares[way] = (found["after"]["accuracy"] - start["accuracy"]) / gain if gain > 0 else float("nan")
        rows.append(row(way, found["after"], f"{found['trained']:,}", f"{found['rate']:g}", f"{shares[way]:.2f}"))
    print(f"Accuracy on {start['n']:.0f} held-out problems of four numbers after {args.steps} steps, from {args.start}")
    print(machine(args.threads, "transformers", "peft"))
    print(table(["trained", "parameters", "peak rate", "accuracy", "95% interval", "share of the full gain"], rows))
    share = shares.get("attention")
    # Written so that NaN, of a full fine-tuning that gained nothing, fails too.
    if share is not None and not share >= REQUIRED:
        print(f"attention reaches {share:.2f} of the full gain, {REQUIRED} are required")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
