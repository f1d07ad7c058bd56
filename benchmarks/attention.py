"""Differential attention V1, forward, backward and decoding: every backend that runs, and what others would call.

python -m benchmarks.attention [--lengths 128 512] [--head-dims 32] [--passes fwd fwd+bwd decode] [--json FILE]

On the CPU, our `sdpa` backend against transformers' DiffLlama. On a GPU, in bfloat16, also the fused kernels, DiffLlama
compiled, FlexAttention with values of 2 d, flash-attn where it is installed, and vanilla attention of as many
parameters: the limit to approach. TFLOP/s by what the result needs, GB/s by the bytes of the cache, saved activations
in elements of N d a differential head, with what the output projection holds.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import cuda_interleaved, environment, interleaved, machine, ratio, ratios, spread, table
from benchmarks.contenders import BASELINE, VANILLA, Case, Contender, check, contenders, saved_per_head

PASSES = ("fwd", "fwd+bwd", "decode")
HEADER = ["pass", "length", "d", "kv", "what", "ms", "TFLOP/s", "GB/s", "saved nd", f"times {BASELINE}"]


def defaults(cuda: bool) -> dict[str, Any]:
    """Sizes that fit the device: a minute or two on two cores; 3072 dims of heads on a GPU."""
    if cuda:
        lengths = [4096, 16384, 2048, 8192, 32768, 65536]
        return {"lengths": lengths, "head_dims": [64, 128], "heads": 0, "tokens": 16384, "decode_rows": 8}
    return {"lengths": [128, 512, 2048], "head_dims": [32], "heads": 4, "tokens": 2048, "decode_rows": 4}


def cases(args: argparse.Namespace) -> list[tuple[str, Case]]:
    """Every pass at every length, the first length first, so that a budget cuts the last ones."""
    found = []
    for length in args.lengths:
        for head_dim in args.head_dims:
            heads = args.heads or 1536 // head_dim
            for groups in dict.fromkeys([heads, max(1, heads // args.kv_ratio)]):
                for kind in args.passes:
                    rows = args.decode_rows if kind == "decode" else max(1, args.tokens // length)
                    queries = 1 if kind == "decode" else length
                    dtype = getattr(torch, args.dtype)
                    found.append((kind, Case(rows, queries, length, heads, groups, head_dim, dtype, args.device)))
    return found


def call_of(way: Contender, case: Case, backward: bool) -> Callable[[], Any]:
    """One call, from leaves of its own layout."""
    leaves = [x.requires_grad_(backward) for x in way.layout(*case.inputs())]
    if not backward:

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return way.attend(*leaves)

        return forward
    cotangent = torch.ones_like(way.attend(*leaves))
    return lambda: torch.autograd.grad(way.attend(*leaves), leaves, cotangent)


def measure(kind: str, case: Case, args: argparse.Namespace, checked: dict[Any, Any]) -> list[dict[str, Any]]:
    """Check every way, once for shapes of one kind, then time all of them in turn but those that failed."""
    # Else torch stops to compile after a few shapes, and measures what is not compiled.
    torch._dynamo.reset()
    ways = contenders(case, args.device == "cuda" and kind != "decode")
    backward = kind == "fwd+bwd"
    shape = (case.head_dim, case.heads // case.groups, kind == "decode")
    if shape not in checked:
        checked[shape] = check(case, ways, backward=kind != "decode")
    ways = {name: way for name, way in ways.items() if name not in checked[shape]}
    calls = {name: call_of(way, case, backward) for name, way in ways.items()}
    timer = cuda_interleaved if args.device == "cuda" else interleaved
    seconds = timer(calls, args.rounds)
    results = []
    for name, way in ways.items():
        took = median(seconds[name])
        saved = saved_per_head(way, case) if backward else None
        results.append(
            {
                "pass": kind,
                "length": case.length,
                "head_dim": case.head_dim,
                "heads": case.heads,
                "kv_groups": case.groups,
                "rows": case.rows,
                "dtype": args.dtype,
                "what": name,
                "ms": [1e3 * s for s in seconds[name]],
                "tflops": None if kind == "decode" else ratio(case.flops(backward, name == VANILLA), took) / 1e12,
                "gb_per_s": ratio(case.cache_bytes, took) / 1e9 if kind == "decode" else None,
                "saved_nd": saved,
                "times_baseline": ratios(seconds[BASELINE], seconds[name]),
            }
        )
    return results


def row(result: dict[str, Any]) -> list[str]:
    """One line of the table."""

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    return [
        result["pass"],
        str(result["length"]),
        str(result["head_dim"]),
        f"{result['kv_groups']}/{result['heads']}",
        result["what"],
        spread(result["ms"], 3 if max(result["ms"]) < 10 else 1),
        number(result["tflops"], 3 if result["tflops"] and result["tflops"] < 1 else 0),
        number(result["gb_per_s"], 1),
        number(result["saved_nd"], 1),
        spread(result["times_baseline"]),
    ]


def copy_gb_per_s(device: str) -> float:
    """Bytes read and written by a copy, the most that a kernel bound by memory can reach."""
    source = torch.empty((2**30 if device == "cuda" else 2**26), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timer = cuda_interleaved if device == "cuda" else interleaved
    seconds = timer({"copy": lambda: target.copy_(source)}, 5)["copy"]
    return ratio(2 * source.numel(), median(seconds)) / 1e9


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    preset = defaults(cuda)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16" if cuda else "float32"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--lengths", type=int, nargs="+", default=preset["lengths"], help="the most important first")
    parser.add_argument("--head-dims", type=int, nargs="+", default=preset["head_dims"])
    parser.add_argument("--heads", type=int, default=preset["heads"], help="differential heads; 0: 1536 / head dim")
    parser.add_argument("--kv-ratio", type=int, default=1 if cuda else 2, help="also with so many heads a group")
    parser.add_argument("--tokens", type=int, default=preset["tokens"], help="tokens in all rows together")
    parser.add_argument("--decode-rows", type=int, default=preset["decode_rows"])
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="begin nothing after so many seconds")
    parser.add_argument("--json", type=Path, help="write results with device, versions and commit")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    started, results, skipped, checked = time.monotonic(), [], [], {}
    for kind, case in cases(args):
        where = f"{kind} at {case.length}, d={case.head_dim}, {case.groups} groups"
        if time.monotonic() - started > args.budget_s:
            skipped.append(f"{where}: no time left")
            continue
        try:
            results += measure(kind, case, args, checked)
        except torch.OutOfMemoryError:
            skipped.append(f"{where}: out of memory")
        if args.device == "cuda":
            torch.cuda.empty_cache()
    for (head_dim, a_group, decode), failed in checked.items():
        shape = f"d={head_dim}, {a_group} heads a group{', decode' if decode else ''}"
        skipped += [f"{name}, {shape}: {reason}" for name, reason in failed.items()]
    found = {
        "environment": environment("transformers", "flash-attn"),
        "copy_gb_per_s": copy_gb_per_s(args.device),
        "results": results,
        "skipped": skipped,
    }
    device = found["environment"]["device"]
    print(f"Differential attention V1, {args.dtype}, {args.tokens} tokens a call, decoding {args.decode_rows} rows")
    print(f"{device}; {machine(args.threads, 'transformers', 'triton')}; {args.rounds} rounds in turn, median (range)")
    print(f"copy: {found['copy_gb_per_s']:.0f} GB/s")
    print(table(HEADER, [row(result) for result in results]))
    for line in skipped:
        print(f"skipped: {line}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
