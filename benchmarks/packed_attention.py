"""Packed documents on the CPU: our document path against a dense boolean mask over the packed row.

python -m benchmarks.packed_attention [--threads 2] [--rounds 5] [--lengths 1024 2048 4096] [--mean-document 150]
"""

import argparse
import random
from collections.abc import Sequence

import torch

from benchmarks.baselines import diffllama_attention, document_mask, to_diffllama_layout
from benchmarks.common import interleaved, machine, ratios, require_close, spread, table
from difftune.ops import Documents, diff_attention

HEADS, LAM = 4, torch.tensor(0.5)


def document_lengths(row: int, mean: int) -> list[int]:
    """Lengths that fill a row, spread from a third of the mean to about twice it, the same in every run."""
    draw = random.Random(0)
    lengths: list[int] = []
    while (left := row - sum(lengths)) > 0:
        lengths.append(min(left, draw.randint(max(1, mean // 3), 2 * mean - mean // 3)))
    return lengths


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="tokens")
    parser.add_argument("--mean-document", type=int, default=150, help="tokens")
    parser.add_argument("--head-dim", type=int, default=32)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    rows = []
    for length in args.lengths:
        lengths = document_lengths(length, args.mean_document)
        shapes = [(HEADS, 2, args.head_dim), (HEADS, 2, args.head_dim), (HEADS, 2 * args.head_dim)]
        inputs = [torch.randn(1, length, *shape, requires_grad=True) for shape in shapes]
        theirs = [x.detach().requires_grad_() for x in to_diffllama_layout(*inputs)]
        mask = document_mask(lengths)
        cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)

        def dense(leaves=theirs, mask=mask) -> tuple[torch.Tensor, ...]:
            out = diffllama_attention(*leaves, LAM, mask)
            return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

        def packed(leaves=inputs, cu_seqlens=cu_seqlens) -> tuple[torch.Tensor, ...]:
            # Preparing the documents is part of the price, though a model pays it once for all its layers.
            out = diff_attention(*leaves, LAM, cu_seqlens=Documents(cu_seqlens), backend="sdpa")
            return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

        expected, actual = dense(), packed()
        require_close(f"packed attention at {length}", actual[0], expected[0], 1e-5)
        for name, ours, baseline in zip("qkv", to_diffllama_layout(*actual[1:]), expected[1:], strict=True):
            require_close(f"gradient of {name} at {length}", ours, baseline, 1e-5)
        seconds = interleaved({"dense": dense, "packed": packed}, args.rounds)
        rows.append(
            [
                str(length),
                str(len(lengths)),
                spread([1e3 * s for s in seconds["dense"]], 1),
                spread([1e3 * s for s in seconds["packed"]], 1),
                spread(ratios(seconds["dense"], seconds["packed"])) + "x",
            ]
        )
    print(f"Differential attention V1 over a packed row, fwd+bwd, {HEADS} heads of 2 x {args.head_dim}, float32")
    print(f"{machine(args.threads, 'transformers')}; {args.rounds} rounds in turn, median (range)")
    print(table(["row", "documents", "DiffLlama sdpa, dense mask ms", "ours ms", "speed-up"], rows))


if __name__ == "__main__":
    main()
