"""Speed of generating texts for an evaluation: batches with the cache against one prompt after the other.

python -m benchmarks.generation [--prompts 16] [--batch-size 16] [--new-tokens 64] [--hidden-size 256] [--threads 2]

The prompts are of unequal length, as problems are, and all texts have the same number of tokens. Greedy texts of both
ways must be the same before any speed is printed. `one by one` has the cache too; `no cache` reads the whole text again
for every token, which is what a plain loop over forward passes does.

Leaves with code 1 if batches of 16 are less than 5 times as fast as one by one (median, any kind of attention).
Batches of another size are not judged.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.common import machine, ratio, ratios, spread, table
from difftune.data.tokenizers import build_tokenizer
from difftune.evaluation.generation import generate_texts
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM

KINDS = ("diff_v1", "diff_v2", "softmax")
REQUIRED, REQUIRED_BATCH = 5.0, 16


def build(kind: str, hidden_size: int, layers: int) -> DiffTransformerForCausalLM:
    """A random model whose texts do not end by themselves: its end-of-text token is never the most likely."""
    torch.manual_seed(0)
    config = DiffTransformerConfig(
        vocab_size=262,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        attention=kind,
        initializer_range=0.2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    model = DiffTransformerForCausalLM(config).eval()
    with torch.no_grad():
        # The same logit, 0, whatever the text; the largest of the others is above it.
        model.lm_head.weight[build_tokenizer("bytes").eos_token_id] = 0
    return model


def without_cache(model: DiffTransformerForCausalLM, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy texts, every token from a forward pass over the whole text."""
    texts = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            for _ in range(new_tokens):
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
                ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
            texts.append(ids[0, len(prompt) :].tolist())
    return texts


def missed_limits(times: dict[str, float]) -> list[str]:
    """A line for each kind of attention whose batches are not `REQUIRED` times as fast as one by one."""
    return [
        f"{kind}: batches are {found:.2f} times as fast, {REQUIRED:g} times one by one are required"
        for kind, found in times.items()
        if not found >= REQUIRED  # NaN, of a clock that was too coarse, misses too
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    tokenizer = build_tokenizer("bytes")
    draw = random.Random(0)
    prompts = [[draw.randrange(6, 262) for _ in range(draw.randint(32, 128))] for _ in range(args.prompts)]
    print(
        f"Greedy generation, float32, hidden {args.hidden_size}, {args.layers} layers, {args.prompts} prompts of 32 to "
        f"128 tokens, {args.new_tokens} new tokens, batches of {args.batch_size}"
    )
    print(f"{machine(args.threads, 'transformers')}; {args.rounds} rounds in turn, median (range)\n", flush=True)
    header = ["attention", "way", "tokens/s", "times one by one"]
    times: dict[str, float] = {}
    for kind in KINDS:
        rows, times[kind] = measure(kind, args, tokenizer, prompts)
        lines = table([f"{name:<16}" for name in header], rows).splitlines()
        # As they come: all of it takes minutes.
        print("\n".join(lines if kind == KINDS[0] else lines[2:]), flush=True)
    if min(args.batch_size, args.prompts) != REQUIRED_BATCH:
        print(f"not judged: the limit is that of batches of {REQUIRED_BATCH}")
        return 0
    missed = missed_limits(times)
    print("\n".join(missed), end="\n" if missed else "")
    return 1 if missed else 0


def measure(
    kind: str, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> tuple[list[list[str]], float]:
    """The rows of one kind of attention, once all ways have written the same; how many times as fast batches are."""
    model, tokens = build(kind, args.hidden_size, args.layers), args.prompts * args.new_tokens

    def write(batch_size: int) -> list[str]:
        found = generate_texts(model, tokenizer, prompts, max_new_tokens=args.new_tokens, batch_size=batch_size)
        if any(text.num_tokens != args.new_tokens for text in found):
            raise SystemExit("a text ended early: the speeds would be those of unequal work")
        return [text.text for text in found]

    begun = time.perf_counter()
    plain = without_cache(model, prompts[:2], args.new_tokens)
    slow = ratio(2 * args.new_tokens, time.perf_counter() - begun)
    expected = [tokenizer.decode(ids, skip_special_tokens=True) for ids in plain]
    together, alone = write(args.batch_size), write(1)
    if together != alone or alone[:2] != expected:
        raise SystemExit(f"{kind}: batches, single prompts and the loop without a cache write different texts")
    # Both are warm by now.
    seconds: dict[str, list[float]] = {"batches": [], "one by one": []}
    for _ in range(args.rounds):
        for name, batch_size in (("batches", args.batch_size), ("one by one", 1)):
            begun = time.perf_counter()
            write(batch_size)
            seconds[name].append(time.perf_counter() - begun)
    rows = [[kind, "no cache", f"{slow:.0f}", ""]]
    for name, times in seconds.items():
        speed = spread([ratio(tokens, s) for s in times], 0)
        rows.append([kind, name, speed, spread(ratios(seconds["one by one"], times), 1)])
    return rows, statistics.median(ratios(seconds["one by one"], seconds["batches"]))


if __name__ == "__main__":
    sys.exit(main())
