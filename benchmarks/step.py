"""A whole training step of a stack of layers of a 3B model: forward, loss, backward, AdamW; ours and DiffLlama.

python -m benchmarks.step [--layers 4] [--seq-len 4096] [--json FILE]

The stack has the width of a 3B model (hidden 3072, 24 maps of 128 dims, feed-forward 8192) and fewer layers, and a
small vocabulary, so that one GPU measures attention and layers and not the head. All have one loss, or nothing is
printed.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.baselines import build_diffllama, build_difftune
from benchmarks.common import environment, in_one_line, machine, ratio, ratios, spread, table
from benchmarks.contenders import BASELINE, Case, backends
from difftune import patch_diffllama


def ways(args: argparse.Namespace, size: dict[str, int]) -> dict[str, Callable[[], Any]]:
    """Name and model of everything that runs here, the baseline first."""
    dtype, head_dim = getattr(torch, args.dtype), size["hidden_size"] // size["num_attention_heads"]
    case = Case(1, 1, 1, 1, 1, head_dim, dtype, args.device)

    def to_device(model: torch.nn.Module) -> torch.nn.Module:
        return model.to(args.device, dtype).train()

    def ours(backend: str) -> torch.nn.Module:
        model = build_difftune(**size)
        model.config.attention_backend = backend
        return to_device(model)

    found: dict[str, Callable[[], Any]] = {BASELINE: lambda: to_device(build_diffllama(**size))}
    if args.compile:
        found[f"{BASELINE}, compiled"] = lambda: torch.compile(to_device(build_diffllama(**size)), dynamic=False)
    for backend in backends(case):
        found[f"{BASELINE}, patched: {backend}"] = lambda: to_device(build_diffllama(**size))
        found[f"difftune {backend}"] = lambda backend=backend: ours(backend)
    return found


def measure(name: str, build: Callable[[], Any], ids: torch.Tensor, steps: int) -> dict[str, Any]:
    """Loss of the first step; seconds and peak memory of the steps after two."""
    cuda = ids.device.type == "cuda"
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    losses, seconds = [], []
    for step in range(steps + 2):
        if cuda:
            torch.cuda.synchronize()
            if step == 2:
                torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return {
        "what": name,
        "loss": losses[0],
        "seconds": seconds[2:],
        "tokens_per_s": ratio(ids.numel(), median(seconds[2:])),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if cuda else "float32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=3072)
    parser.add_argument("--heads", type=int, default=24, help="softmax maps, two a differential head")
    parser.add_argument("--intermediate-size", type=int, default=8192)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda, help="DiffLlama compiled too")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="begin nothing after so many seconds")
    parser.add_argument("--json", type=Path, help="write results with device, versions and commit")
    args = parser.parse_args(argv)
    size = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.intermediate_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.heads,
        "max_position_embeddings": args.seq_len,
    }
    torch.manual_seed(0)
    ids = torch.randint(3, args.vocab_size, (args.rows, args.seq_len), device=args.device)
    started, results, skipped = time.monotonic(), [], []
    for name, build in ways(args, size).items():
        if time.monotonic() - started > args.budget_s:
            skipped.append(f"{name}: no time left")
            continue
        try:
            if "patched" in name:
                with patch_diffllama(name.split(": ")[1]):
                    results.append(measure(name, build, ids, args.steps))
            else:
                results.append(measure(name, build, ids, args.steps))
        except torch.OutOfMemoryError:
            skipped.append(f"{name}: out of memory")
        except Exception as error:
            # What torch compiles depends on its version and the GPU; ours and the baseline must run.
            if not name.endswith(", compiled"):
                raise
            skipped.append(f"{name}: {in_one_line(error)}")
        if args.device == "cuda":
            torch.cuda.empty_cache()
    allowed = 1e-4 if args.dtype == "float32" else 1e-2
    baseline = results[0]
    for result in results:
        # Written so that NaN fails too.
        if not abs(result["loss"] - baseline["loss"]) <= allowed * abs(baseline["loss"]):
            raise SystemExit(
                f"{result['what']} is wrong: loss {result['loss']}, {BASELINE} {baseline['loss']}. No speed is printed."
            )
        result["times_baseline"] = ratios(baseline["seconds"], result["seconds"])
    found = {"environment": environment("transformers"), "size": size, "results": results, "skipped": skipped}
    print(
        f"Training step, {args.dtype}, {args.layers} layers of hidden {args.hidden_size}, {args.rows} rows of "
        f"{args.seq_len} tokens, AdamW"
    )
    print(f"{found['environment']['device']}; {machine(torch.get_num_threads(), 'transformers', 'triton')}")
    header = ["what", "ms a step", "tokens/s", "peak GiB", "loss", f"times {BASELINE}"]
    rows = [
        [
            result["what"],
            spread([1e3 * s for s in result["seconds"]], 1),
            f"{result['tokens_per_s']:.0f}",
            "" if result["peak_gib"] is None else f"{result['peak_gib']:.2f}",
            f"{result['loss']:.5f}",
            spread(result["times_baseline"]),
        ]
        for result in results
    ]
    print(table(header, rows))
    for line in skipped:
        print(f"skipped: {line}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
