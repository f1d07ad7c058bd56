"""Memory of a training step of an adapter, and of an evaluation, over the length of the row; and of a shared row.

Each point is a fresh process, or two that share the row: the peak of its resident memory above what it held before.

    python -m benchmarks.long_context
    python -m benchmarks.long_context --part context --tokens 16384

Nothing is printed unless the mean NLL of the evaluation equals the loss of the step, before an update, on the same
tokens; and unless two processes find the loss of one.
"""

import argparse
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.common import PeakMemory, machine, ratio, report, run_child, table

PARTS = ("step", "nll", "context")


def build(args: argparse.Namespace, length: int) -> Any:
    """A small V1 model with an adapter, in train mode."""
    import torch

    from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
    from difftune.modeling.adapter_settings import AdapterSettings
    from difftune.modeling.adapters import add_adapter

    torch.manual_seed(0)
    config = DiffTransformerConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=4 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        head_dim=args.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": 640000.0},
        max_position_embeddings=length,
    )
    model = DiffTransformerForCausalLM(config)
    model.chunk_mlp(args.mlp_chunk or None)
    add_adapter(model, AdapterSettings(preset="attention", rank=8))
    return model.train()


def tokens(args: argparse.Namespace, length: int) -> Any:
    """One row."""
    import torch

    return torch.randint(args.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))


def take_step(model: Any, inputs: dict[str, Any]) -> tuple[float, int]:
    """One step of AdamW on what is trained: summed loss before it, and the number of labels."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    output = model(**inputs, use_cache=False)
    (output.loss_sum / inputs["input_ids"].numel()).backward()
    optimizer.step()
    return output.loss_sum.item(), int(output.num_label_tokens)


def measure(args: argparse.Namespace) -> None:
    """One point in this process; reports to the parent."""
    import torch

    torch.set_num_threads(args.threads)
    length = args.tokens[0]
    model, ids = build(args, length), tokens(args, length)
    inputs: dict[str, Any] = {"input_ids": ids, "labels": ids}
    if args.ranks > 1:
        import torch.distributed as dist

        from difftune.training.context_parallel import build_context_group, split_batch

        address = f"tcp://127.0.0.1:{args.port}"
        dist.init_process_group("gloo", init_method=address, rank=args.rank, world_size=args.ranks)
        inputs = split_batch(inputs, build_context_group(args.ranks))
    memory, start = PeakMemory(), time.perf_counter()
    if args.child == "nll":
        from difftune.evaluation.likelihood import token_nll

        with torch.no_grad():
            nll = token_nll(model.eval(), ids[0], chunk_size=args.chunk_size)
        assert nll is not None
        loss, labels = float(nll.double().sum()), len(nll)
    else:
        loss, labels = take_step(model, inputs)
    seconds = time.perf_counter() - start
    report(gib=memory.above_start_gib, start_gib=memory.start_gib, loss=loss, labels=labels, seconds=seconds)


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """Least squares ``y = a + b x``: a, b, and the largest distance from the line as a share of the largest y."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)
    start = mean_y - slope * mean_x
    return start, slope, ratio(max(abs(start + slope * x - y) for x, y in zip(xs, ys, strict=True)), max(ys))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["length", "context"], default="length")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768, 65536])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2, help="softmax maps: two a differential head")
    parser.add_argument("--head-dim", type=int, default=16)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--mlp-chunk", type=int, default=4096, help="0: all tokens at once")
    parser.add_argument("--chunk-size", type=int, default=1024, help="tokens of a forward pass of the evaluation")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    for hidden, default in (("--rank", 0), ("--ranks", 1), ("--port", 0)):
        parser.add_argument(hidden, type=int, default=default, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return measure(args)
    # Large blocks go back to the system when they are freed. By default glibc keeps them, with holes between them, and
    # the peak of an evaluation, whose cache is copied as it grows, differs by 0.3 GiB from one run to the next.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**20))
    shape = f"hidden {args.hidden_size}, {args.layers} layers, differential heads: {args.heads // 2} of {args.head_dim}"
    print(f"V1, {shape}, vocabulary {args.vocab_size}, LoRA, float32, MLP in chunks of {args.mlp_chunk or 'all'}")
    print(machine(args.threads))
    (over_length if args.part == "length" else shared_row)(args)


def over_length(args: argparse.Namespace) -> None:
    """The table of `--part length`."""
    rows, points = [], {"step": [], "nll": []}
    for length in args.tokens:
        step, nll = (_point(args, part, length) for part in ("step", "nll"))
        _require_equal(f"{length} tokens: the NLL", nll, step)
        for part, found in (("step", step), ("nll", nll)):
            points[part].append(found["gib"])
        rows.append([f"{length:,}", *(f"{found[of]:.3f}" for found in (step, nll) for of in ("gib", "seconds"))])
        print("|", " | ".join(rows[-1]), "|", flush=True)
    print()
    print(table(["tokens", "step GiB", "step s", "NLL GiB", "NLL s"], rows))
    if len(args.tokens) > 1:
        for part, found in points.items():
            start, slope, off = fit_line(args.tokens, found)
            print(
                f"{part}: {slope * 2**30 / 1024:.2f} KiB a token above {start * 1024:.0f} MiB, off the line by at most "
                f"{off:.1%}; {found[-1] / found[0]:.2f} times the memory for "
                f"{args.tokens[-1] / args.tokens[0]:g} times the tokens"
            )


def shared_row(args: argparse.Namespace) -> None:
    """The table of `--part context`."""
    import socket

    rows = []
    for length in args.tokens:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        one = _point(args, "context", length)
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda rank: _point(args, "context", length, rank, 2, port), range(2)))  # noqa: B023
        total = {"loss": sum(part["loss"] for part in both), "labels": sum(part["labels"] for part in both)}
        _require_equal(f"{length} tokens: the loss of two processes", total, one)
        for who, found in (("one process", one), *((f"rank {rank} of 2", part) for rank, part in enumerate(both))):
            share = f"{ratio(found['gib'], one['gib']):.2f}"
            rows.append([f"{length:,}", who, f"{found['gib']:.3f}", share, f"{found['seconds']:.1f}"])
    print(table(["tokens", "process", "step GiB", "of one", "step s"], rows))


def _point(args: argparse.Namespace, part: str, length: int, rank: int = 0, ranks: int = 1, port: int = 0) -> Any:
    kept = ("hidden_size", "layers", "heads", "head_dim", "vocab_size", "mlp_chunk", "chunk_size")
    passed = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in kept]
    threads = max(1, args.threads // ranks)
    passed += ["--child", part, "--tokens", str(length), f"--threads={threads}"]
    passed += [f"--rank={rank}", f"--ranks={ranks}", f"--port={port}"]
    return run_child("benchmarks.long_context", passed, threads, timeout_s=3600)


def _require_equal(what: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    # Written so that NaN fails too.
    if found["labels"] != expected["labels"] or not abs(found["loss"] - expected["loss"]) <= 1e-5 * expected["loss"]:
        raise SystemExit(f"{what} differs: {found} against {expected}. No memory is printed for a wrong result.")


if __name__ == "__main__":
    main()
