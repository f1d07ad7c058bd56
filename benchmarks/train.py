"""Training speed on the CPU: `difftune fit` against a bare loop and TRL on transformers' DiffLlama.

python -m benchmarks.train [--threads 2] [--rounds 3] [--steps 10]

One configuration, the same initial weights and the same documents for all, each run in a process of its own, in
turn. The first table has documents of exactly the row length, so that nobody pads; the second has documents of
unequal length, counted in label tokens: padded to the longest of the batch, or packed.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import machine, ratio, ratios, report, run_child, spread, table

BARE, TRL, OURS = "bare loop, DiffLlama", "TRL SFTTrainer, DiffLlama", "difftune"
FULL = (BARE, TRL, OURS)
BARE_PADDED, OURS_PADDED, OURS_PACKED = "bare loop, padded", "difftune, padded", "difftune, packed"
UNEQUAL = (BARE_PADDED, OURS_PADDED, OURS_PACKED)
EOS, FIRST_WORD, WARM_UP = 2, 4, 3
LR, CLIP, BETAS = 1e-4, 1.0, (0.9, 0.95)


def documents(args: argparse.Namespace, equal: bool, count: int) -> list[list[int]]:
    """Random documents, the same for every contender, that end with the end-of-text token."""
    import numpy as np

    draw = np.random.default_rng(0)
    lengths = np.full(count, args.seq_len) if equal else draw.integers(args.seq_len // 8, args.seq_len // 2, count)
    return [[*draw.integers(FIRST_WORD, args.vocab_size, n - 1).tolist(), EOS] for n in lengths]


def padded_batches(rows: Sequence[list[int]], size: int) -> Iterator[dict[str, Any]]:
    """Batches as a transformers user makes them: padded on the right to the longest row."""
    import torch

    for start in range(0, len(rows) - size + 1, size):
        ids = [torch.tensor(row) for row in rows[start : start + size]]
        input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        yield {"input_ids": input_ids, "labels": input_ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def model_size(args: argparse.Namespace) -> dict[str, int]:
    """The configuration that all contenders train."""
    return {
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "intermediate_size": 4 * args.hidden_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": args.seq_len,
    }


def tokenizer(args: argparse.Namespace) -> Any:
    """A tokenizer for which the text `t7 t9` is the ids 7 and 9."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": EOS, "<unk>": 3}
    vocabulary |= {f"t{i}": i for i in range(FIRST_WORD, args.vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def run_bare(args: argparse.Namespace, equal: bool) -> None:
    """A plain PyTorch loop."""
    import torch

    from benchmarks.baselines import build_diffllama

    model = build_diffllama(**model_size(args)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=0.0, fused=True)
    losses, ends, labels = [], [], []
    rows = documents(args, equal, args.batch_size * (args.steps + WARM_UP))
    for batch in padded_batches(rows, args.batch_size):
        labels.append(int((batch["labels"][:, 1:] != -100).sum()))
        if equal:
            del batch["attention_mask"]
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        ends.append(time.perf_counter())
    finish(args, losses, ends, labels)


def run_trl(args: argparse.Namespace) -> None:
    """TRL's SFTTrainer, with gradient checkpointing off as in the other two."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from benchmarks.baselines import build_diffllama

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=args.batch_size,
            max_steps=args.steps + WARM_UP,
            max_length=args.seq_len,
            packing=False,
            gradient_checkpointing=False,
            learning_rate=LR,
            lr_scheduler_type="constant",
            adam_beta2=BETAS[1],
            weight_decay=0.0,
            max_grad_norm=CLIP,
            use_cpu=True,
            bf16=False,
            fp16=False,
            dataloader_pin_memory=False,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        rows = documents(args, True, args.batch_size * (args.steps + WARM_UP))
        trainer = SFTTrainer(
            model=build_diffllama(**model_size(args)),
            args=settings,
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=tokenizer(args),
            callbacks=[Clock()],
        )
        torch.set_num_threads(args.threads)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    finish(args, losses, ends, [args.batch_size * (args.seq_len - 1)] * len(ends))


def run_ours(args: argparse.Namespace, equal: bool, packing: bool) -> None:
    """`difftune fit` on a recipe: its data module, training module, callbacks and loggers; timed by its metrics."""
    from benchmarks.baselines import build_difftune
    from difftune.commands.run import fit
    from difftune.config import load_config

    steps = args.steps + WARM_UP
    # Packed rows hold several documents each.
    count = args.batch_size * steps * (8 if packing else 1)
    with tempfile.TemporaryDirectory() as folder:
        model, source, recipe, run_dir = (Path(folder) / name for name in ("model", "docs.jsonl", "r.yaml", "run"))
        build_difftune(**model_size(args)).save_pretrained(model)
        tokenizer(args).save_pretrained(model)
        texts = [" ".join(f"t{i}" for i in row[:-1]) for row in documents(args, equal, count)]
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        config = {
            "run_dir": str(run_dir),
            "model": {"path": str(model)},
            "data": {
                "train": [{"path": str(source), "format": "text"}],
                "seq_len": args.seq_len,
                "micro_batch_size": args.batch_size,
                "packing": packing,
                "shuffle": False,
            },
            "optim": {"lr": LR, "betas": list(BETAS), "weight_decay": 0.0, "schedule": "constant"},
            "trainer": {
                "accelerator": "cpu",
                "devices": 1,
                "max_steps": steps,
                "gradient_clip_val": CLIP,
                "log_every_n_steps": 1,
            },
            "export": None,
        }
        recipe.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
        fit(load_config(recipe))
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line for line in lines if line["name"] == "train/loss"]
    labels = [int(line["value"]) for line in lines if line["name"] == "train/label_tokens"]
    finish(args, [line["value"] for line in losses], [line["time"] for line in losses], labels)


def finish(args: argparse.Namespace, losses: list[float], ends: list[float], labels: list[int]) -> None:
    """Report what was measured after the warm-up steps."""
    seconds = [b - a for a, b in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False)]
    report(
        tokens_per_s=ratio(args.batch_size * args.seq_len, statistics.median(seconds)),
        label_tokens_per_s=ratio(sum(labels[WARM_UP:]), sum(seconds)),
        first_loss=losses[0],
        last_loss=losses[-1],
    )


def run(kind: str, args: argparse.Namespace) -> None:
    """Run one contender in this process."""
    import torch

    torch.set_num_threads(args.threads)
    if kind == TRL:
        run_trl(args)
    elif kind in (BARE, BARE_PADDED):
        run_bare(args, equal=kind == BARE)
    else:
        run_ours(args, equal=kind == OURS, packing=kind == OURS_PACKED)


def check(results: dict[str, list[dict[str, Any]]]) -> None:
    """Leave with an error unless the contenders train the same model on the same data to the same losses."""
    for ours, baseline, what in (
        (OURS, BARE, "first_loss"),
        (OURS, BARE, "last_loss"),
        (OURS_PADDED, BARE_PADDED, "first_loss"),
        (OURS_PADDED, BARE_PADDED, "last_loss"),
    ):
        if ours not in results:
            continue
        mine, theirs = results[ours][0][what], results[baseline][0][what]
        # Written so that NaN fails too.
        if not abs(mine - theirs) <= 2e-4 * theirs:
            raise SystemExit(f"{what}: {ours} {mine}, {baseline} {theirs}. No speed is printed for another result.")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help=f"timed steps, after {WARM_UP} untimed ones")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=[*FULL, *UNEQUAL], default=[*FULL, *UNEQUAL])
    parser.add_argument("--child", choices=[*FULL, *UNEQUAL], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return run(args.child, args)

    passed = [f"--{k.replace('_', '-')}={v}" for k, v in vars(args).items() if k not in ("child", "only", "rounds")]
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in args.only}
    for _ in range(args.rounds):
        for kind in args.only:
            results[kind].append(run_child("benchmarks.train", ["--child", kind, *passed], args.threads))
    check(results)
    print(
        f"Training, float32, hidden {args.hidden_size}, {args.layers} layers, 8 maps, vocabulary {args.vocab_size}, "
        f"{args.batch_size} rows of {args.seq_len} tokens, AdamW, clipping"
    )
    print(f"{machine(args.threads, 'transformers', 'lightning', 'trl')}; {args.rounds} rounds in turn, median (range)")
    for kinds, what, title in (
        (FULL, "tokens_per_s", "tokens/s, full rows"),
        (UNEQUAL, "label_tokens_per_s", "label tokens/s, documents of unequal length"),
    ):
        shown = [kind for kind in kinds if kind in results]
        if shown:
            speeds = {kind: [result[what] for result in results[kind]] for kind in shown}
            header = ["trainer", title, *(f"times {kind}" for kind in shown if kind not in (OURS, OURS_PACKED))]
            print(table(header, rows_of(speeds, header[2:])))


def rows_of(speeds: dict[str, list[float]], compared: Sequence[str]) -> list[list[str]]:
    """One row a contender: its speed, and how many times the speed of each that it is compared with."""
    return [
        [
            kind,
            spread(values, 0),
            *(spread(ratios(values, speeds[other.removeprefix("times ")])) for other in compared),
        ]
        for kind, values in speeds.items()
    ]


if __name__ == "__main__":
    main()
