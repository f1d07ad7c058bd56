"""Peak memory of one distillation loss, forward and backward: in chunks, against torch on all logits.

python -m benchmarks.divergence [--threads 2] [--tokens 8192] [--vocab-size 100288] [--hidden-size 256]

The plain one is ``F.kl_div(log_softmax(student), log_softmax(teacher), log_target=True)`` on the whole logits. Each
runs in a process of its own; counted is what the step needs beyond hidden states and heads. The plain one needs about
6 times the logits of all tokens: 18 GiB by default.
"""

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import PeakMemory, machine, ratio, report, run_child, table

PLAIN, DENSE, SPARSE = "torch, all logits", "chunked", "chunked, stored top 64"
KINDS = (PLAIN, DENSE, SPARSE)


def measure(kind: str, args: argparse.Namespace) -> None:
    """One forward and backward in this process; reports memory, loss and gradient to the parent."""
    import torch
    import torch.nn.functional as F

    from difftune.losses import TeacherStates, TopK, linear_divergence, top_k

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    scale = args.hidden_size**-0.25
    hidden, teacher_hidden = (scale * torch.randn(args.tokens, args.hidden_size) for _ in range(2))
    weight, teacher_weight = (scale * torch.randn(args.vocab_size, args.hidden_size) for _ in range(2))
    hidden.requires_grad_()
    weight.requires_grad_()
    labels = torch.zeros(args.tokens, dtype=torch.int64)
    stored = None
    if kind == SPARSE:
        k = min(64, args.vocab_size)
        parts = [top_k(part, teacher_weight, k) for part in teacher_hidden.split(64)]
        stored = TopK(*(torch.cat(part) for part in zip(*parts, strict=True)))
    gc.collect()
    memory = PeakMemory()
    if kind == PLAIN:
        with torch.no_grad():
            log_p = F.log_softmax(teacher_hidden @ teacher_weight.T, dim=-1)
        loss = F.kl_div(F.log_softmax(hidden @ weight.T, dim=-1), log_p, log_target=True, reduction="sum")
    else:
        teacher = TeacherStates(teacher_hidden, teacher_weight) if stored is None else stored
        loss, _ = linear_divergence(hidden, weight, labels, teacher)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    norm = torch.nn.utils.get_total_norm([hidden.grad, weight.grad])
    report(step_gib=memory.above_start_gib, loss=loss.item() / args.tokens, grad_norm=norm.item())


def available_gib() -> float:
    """Memory that processes may still take, where Linux tells; else no limit."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return float("inf")
    return next(int(x.split()[1]) for x in info.read_text().splitlines() if x.startswith("MemAvailable")) / 2**20


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab-size", type=int, default=100_288)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return measure(args.child, args)

    needed = 6 * args.tokens * args.vocab_size * 4 / 2**30
    if needed > available_gib():
        raise SystemExit(
            f"the plain loss needs about {needed:.0f} GiB and {available_gib():.0f} are free: take fewer --tokens"
        )
    passed = [f"--{name.replace('_', '-')}={value}" for name, value in vars(args).items() if name != "child"]
    results = {kind: run_child("benchmarks.divergence", ["--child", kind, *passed], args.threads) for kind in KINDS}
    for what in ("loss", "grad_norm"):
        theirs, ours = results[PLAIN][what], results[DENSE][what]
        # Written so that NaN fails too.
        if not abs(theirs - ours) <= 1e-4 * abs(theirs):
            raise SystemExit(
                f"{what} differs: plain {theirs}, chunked {ours}. No memory is printed for a wrong result."
            )
    plain = results[PLAIN]["step_gib"]
    rows = [
        [kind, f"{result['step_gib']:.2f}", f"{ratio(result['step_gib'], plain):.3f}", f"{result['loss']:.5f}"]
        for kind, result in results.items()
    ]
    print(
        f"Peak memory of forward KL, forward and backward: {args.tokens} tokens, vocabulary {args.vocab_size}, hidden "
        f"{args.hidden_size}, float32"
    )
    print(machine(args.threads))
    print(table(["loss", "step GiB", "of the plain one", "nats a token"], rows))


if __name__ == "__main__":
    main()
