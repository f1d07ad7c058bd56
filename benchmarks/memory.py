"""Peak memory of one forward and backward: ours against transformers' DiffLlama with its own cross entropy.

python -m benchmarks.memory [--threads 2] [--tokens 8192] [--seq-len 1024] [--vocab-size 100288]

Each model runs in a process of its own. Counted is what the step needs beyond the built model (activations, logits
and gradients), and the whole process with interpreter, libraries and weights.
"""

import argparse
import gc
from collections.abc import Sequence

from benchmarks.common import PeakMemory, machine, ratio, report, run_child, table

BASELINE, OURS = "transformers DiffLlama", "difftune"


def measure(kind: str, args: argparse.Namespace) -> None:
    """One forward and backward in this process; reports memory and loss to the parent."""
    import torch

    from benchmarks.baselines import build_diffllama, build_difftune

    torch.set_num_threads(args.threads)
    build = build_diffllama if kind == BASELINE else build_difftune
    model = build(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=4 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=args.seq_len,
    )
    ids = torch.randint(3, args.vocab_size, (args.tokens // args.seq_len, args.seq_len))
    gc.collect()
    memory = PeakMemory()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    report(step_gib=memory.above_start_gib, total_gib=memory.total_gib, loss=loss.item(), grad_norm=norm.item())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=100_288)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--child", choices=[BASELINE, OURS], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.tokens % args.seq_len:
        parser.error(f"--tokens {args.tokens} must be a multiple of --seq-len {args.seq_len}")
    if args.child:
        return measure(args.child, args)

    passed = [f"--{name.replace('_', '-')}={value}" for name, value in vars(args).items() if name != "child"]
    results = {
        kind: run_child("benchmarks.memory", ["--child", kind, *passed], args.threads) for kind in (BASELINE, OURS)
    }
    for what in ("loss", "grad_norm"):
        theirs, ours = results[BASELINE][what], results[OURS][what]
        # Both have the same weights and tokens; written so that NaN fails too.
        if not abs(theirs - ours) <= 1e-4 * abs(theirs):
            raise SystemExit(
                f"{what} differs: DiffLlama {theirs}, ours {ours}. No memory is printed for a wrong result."
            )
    rows = [
        [kind, f"{result['step_gib']:.2f}", f"{result['total_gib']:.2f}", f"{result['loss']:.5f}"]
        for kind, result in results.items()
    ]
    share = {what: ratio(results[OURS][what], results[BASELINE][what]) for what in ("step_gib", "total_gib")}
    rows.append(["ours / baseline", f"{share['step_gib']:.3f}", f"{share['total_gib']:.3f}", ""])
    print(
        f"Peak memory of one forward and backward: {args.tokens} tokens in rows of {args.seq_len}, vocabulary "
        f"{args.vocab_size}, hidden {args.hidden_size}, {args.layers} layers, float32"
    )
    print(machine(args.threads, "transformers"))
    print(table(["model", "step GiB", "process GiB", "loss"], rows))


if __name__ == "__main__":
    main()
