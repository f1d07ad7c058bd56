"""What `difftune plan` says of the peak of a training step on the CPU, against the peak of that training.

python -m benchmarks.plan [--scale 4] [--threads 1]

The texts are what the plan assumes: rows are full, every token is learned, four documents in a packed row. Each
configuration trains for two optimiser steps in a process of its own, through the same objects as `difftune fit`.
Measured is the peak of torch's allocator, by the profiler, from the building of the model on; and the resident memory
of the process above what it held before, which has the gaps of the allocator and whatever libraries load besides.
"""

import argparse
import copy
import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import PeakMemory, machine, ratio, report, run_child, table

CONFIGURATIONS = {
    "diff_v1, bf16-mixed, checkpointing": ["trainer.precision=bf16-mixed", "model.gradient_checkpointing=true"],
    "diff_v1, whole model, packed": ["model.attention=diff_v1"],
    "diff_v2, LoRA, checkpointing": ["adapter.preset=attention", "model.gradient_checkpointing=true"],
    "softmax, accumulation, padded": [
        "model.attention=softmax",
        "trainer.accumulate_grad_batches=2",
        "data.packing=false",
        "model.tie_word_embeddings=true",
    ],
}


SEQ_LEN = 256
DOCUMENTS_A_ROW = 4


def overrides(name: str, scale: int, folder: Path) -> list[str]:
    """A configuration as overrides; writes its texts, and the base of an adapter."""
    base = write_base(folder / "base", scale) if "LoRA" in name else None
    texts = folder / "texts.jsonl"
    characters = SEQ_LEN - 4 if "padded" in name else SEQ_LEN // DOCUMENTS_A_ROW - 4
    texts.write_text((json.dumps({"text": "7" * characters}) + "\n") * 400, encoding="utf-8")
    shape = [
        f"model.hidden_size={64 * scale}",
        f"model.intermediate_size={176 * scale}",
        "model.num_hidden_layers=5",
        "model.num_attention_heads=8",
        "model.vocab_size=4096",
    ]
    found = [
        "tokenizer=digits",
        *([f"model.path={base}"] if base else shape),
        f"data.train=[{{path: {texts}}}]",
        f"data.seq_len={SEQ_LEN}",
        f"data.micro_batch_size={2 * scale}",
        "trainer.accelerator=cpu",
        "trainer.max_steps=2",
        "trainer.log_every_n_steps=1",
        "evaluation.before=false",
        "evaluation.at_end=false",
    ]
    return found + CONFIGURATIONS[name]


def write_base(folder: Path, scale: int) -> Path:
    """A random V2 model, for the adapter."""
    import torch

    from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM

    torch.manual_seed(0)
    config = DiffTransformerConfig(
        vocab_size=4096,
        hidden_size=64 * scale,
        intermediate_size=176 * scale,
        num_hidden_layers=5,
        num_attention_heads=8,
        attention="diff_v2",
    )
    DiffTransformerForCausalLM(config).save_pretrained(folder)
    return folder


def planned_peak(config: Any) -> int:
    """Bytes, as planned."""
    from difftune.plan.stages import plan_stages

    return plan_stages(config)[0].peak.total


def train(config: Any, cache_dir: Path) -> None:
    """Two optimiser steps, from the building of the model on."""
    from lightning.pytorch import Trainer

    from difftune.builder import build_adapter, build_data, build_model, build_module, build_tokenizer

    tokenizer = build_tokenizer(config)
    stage = config.resolved_stages()[0]
    data = build_data(stage, tokenizer, cache_dir)
    model = build_model(config.model, tokenizer, config.seed)
    module = build_module(stage, model, data, tokenizer, adapted=build_adapter(config, model))
    Trainer(
        accelerator="cpu",
        max_steps=stage.trainer.max_steps,
        accumulate_grad_batches=stage.trainer.accumulate_grad_batches,
        gradient_clip_val=stage.trainer.gradient_clip_val,
        precision=stage.trainer.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    ).fit(module, data)


def allocated_peak(config: Any, cache_dir: Path) -> int:
    """Bytes that lived at most, by every allocation and release that torch's allocator reports to the profiler."""
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    # What was there before would otherwise be released while it is counted.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(config, cache_dir)
    changes: list[tuple[int, int, int]] = []
    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.typed[0] == _EventType.Allocation:
            changes.append((event.start_time_ns, event.typed[1].ptr, event.typed[1].alloc_size))
    live: dict[int, int] = {}
    total = peak = 0
    for _, pointer, size in sorted(changes, key=lambda change: change[0]):
        if size > 0:
            live[pointer] = size
            total += size
        else:
            total -= live.pop(pointer, 0)
        peak = max(peak, total)
    return peak


def measure(kind: str, name: str, scale: int, threads: int) -> None:
    """One configuration in this process; reports bytes to the parent."""
    import torch

    from difftune.config import load_config

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(None, overrides(name, scale, Path(folder)))
        if kind == "allocated":
            report(planned=planned_peak(config), allocated=allocated_peak(config, Path(folder)))
            return
        # Once before, with what is loaded and allocated only once.
        small = copy.deepcopy(config)
        small.data.micro_batch_size = 1
        train(small, Path(folder))
        gc.collect()
        memory = PeakMemory()
        train(config, Path(folder))
        report(resident=int(memory.above_start_gib * 2**30))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scale", type=int, default=4, help="of width and rows")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return measure(*args.child, args.scale, args.threads)
    rows = []
    for name in CONFIGURATIONS:
        passed = [f"--threads={args.threads}", f"--scale={args.scale}"]
        found: dict[str, Any] = {}
        for kind in ("allocated", "resident"):
            found |= run_child("benchmarks.plan", ["--child", kind, name, *passed], args.threads)
        planned, allocated, resident = (found[key] / 2**20 for key in ("planned", "allocated", "resident"))
        rows.append(
            [
                name,
                f"{planned:.1f}",
                f"{allocated:.1f}",
                f"{ratio(planned, allocated):.3f}",
                f"{resident:.1f}",
                f"{ratio(planned, resident):.3f}",
            ]
        )
    print("Peak memory of a training step, MiB: planned, and measured over two optimiser steps")
    print(machine(args.threads, "transformers", "lightning", "peft"))
    header = ["what", "planned", "allocator", "planned / allocator", "resident", "planned / resident"]
    print(table(header, rows))


if __name__ == "__main__":
    sys.exit(main())
