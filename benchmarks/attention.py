"""Differential attention on the CPU: our `sdpa` backend against DiffLlama's composition, forward and backward.

python -m benchmarks.attention [--threads 2] [--rounds 5] [--tokens 2048] [--lengths 128 512 2048]
"""

import argparse
from collections.abc import Callable, Sequence

import torch

from benchmarks.baselines import diffllama_attention, to_diffllama_layout
from benchmarks.common import interleaved, machine, ratios, require_close, spread, table
from difftune.ops import diff_attention

HEADS, LAM = 4, torch.tensor(0.5)


def sample(rows: int, length: int, groups: int, head_dim: int) -> list[torch.Tensor]:
    """Random q, k, v in our layout that ask for gradients."""
    shapes = [(HEADS, 2, head_dim), (groups, 2, head_dim), (groups, 2 * head_dim)]
    return [torch.randn(rows, length, *shape, requires_grad=True) for shape in shapes]


def contenders(inputs: list[torch.Tensor], backward: bool) -> dict[str, Callable[[], torch.Tensor]]:
    """The two ways to compute the same thing, each from inputs in its own layout."""
    theirs = [x.detach().requires_grad_() for x in to_diffllama_layout(*inputs)]

    def run(attend: Callable[..., torch.Tensor], leaves: list[torch.Tensor]) -> torch.Tensor:
        if not backward:
            with torch.no_grad():
                return attend(*leaves, LAM)
        out = attend(*leaves, LAM)
        torch.autograd.grad(out.sum(), leaves)
        return out.detach()

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        return diff_attention(q, k, v, lam, backend="sdpa")

    return {"baseline": lambda: run(diffllama_attention, theirs), "ours": lambda: run(ours, inputs)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in all rows together")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--head-dim", type=int, default=32)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    rows = []
    for length in args.lengths:
        for groups in (HEADS, HEADS // 2):
            inputs = sample(max(1, args.tokens // length), length, groups, args.head_dim)
            for backward in (False, True):
                calls = contenders(inputs, backward)
                require_close(f"diff_attention at length {length}", calls["ours"](), calls["baseline"](), 1e-5)
                seconds = interleaved(calls, args.rounds)
                rows.append(
                    [
                        str(length),
                        str(groups),
                        "fwd+bwd" if backward else "fwd",
                        spread([1e3 * s for s in seconds["baseline"]], 1),
                        spread([1e3 * s for s in seconds["ours"]], 1),
                        spread(ratios(seconds["baseline"], seconds["ours"])) + "x",
                    ]
                )
    print(f"Differential attention V1, {HEADS} heads of 2 x {args.head_dim}, float32, {args.tokens} tokens a call")
    print(f"{machine(args.threads, 'transformers')}; {args.rounds} rounds in turn, median (range)")
    print(table(["length", "kv groups", "pass", "DiffLlama sdpa ms", "ours ms", "speed-up"], rows))


if __name__ == "__main__":
    main()
