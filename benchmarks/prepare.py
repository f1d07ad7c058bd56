"""Tokens a second of `difftune prepare`, against the tokenizer alone on the same texts in the same run.

python -m benchmarks.prepare [--workers 2] [--rows 20000] [--rounds 3]

The rows are chats like R1 traces: a question, and some thousand characters of Python's standard library as the answer.
The tokenizer is a byte-level BPE trained on that library. Reading, the chat template, the label mask and writing are
counted for difftune, and nothing of them for the tokenizer alone, which is the limit.
"""

import argparse
import hashlib
import json
import os
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import interleaved, machine, spread, table

CHARACTERS = 8000


def write_rows(path: Path, rows: int) -> list[str]:
    """Write the chats; return their answers."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    answers = []
    with path.open("w") as stream:
        for n in range(rows):
            start = n * 977 % (len(text) - CHARACTERS)
            answers.append(f"<think>\n{text[start : start + CHARACTERS]}\n</think>\n\nThe answer is {n}.")
            turns = [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": answers[-1]}]
            stream.write(json.dumps({"messages": turns}) + "\n")
    return answers


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    args = parser.parse_args(argv)
    # Before the library starts its threads: as many as there are processes on the other side.
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from difftune.data.sources import Source
    from difftune.data.token_cache import cache_entry, load_tokenized
    from difftune.data.tokenizers import CHAT_TEMPLATE, SPECIAL_TOKENS

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        answers = write_rows(file, args.rows)
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=args.vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(answers[:: max(1, len(answers) // 500)], trainer)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|eos|>"
        )
        tokenizer.chat_template = CHAT_TEMPLATE
        source, calls = Source(str(file)), 0
        hashes: set[str] = set()

        def prepared(workers: int) -> int:
            nonlocal calls
            calls += 1
            cache = Path(folder) / str(calls)
            tokens = load_tokenized(source, tokenizer, cache, workers=workers)
            entry = cache_entry(source, tokenizer, cache)
            files = b"".join((entry / name).read_bytes() for name in ("ids.bin", "learned.bin"))
            hashes.add(hashlib.sha256(files).hexdigest())
            return len(tokens.ids)

        def alone() -> int:
            parts = (answers[start : start + 512] for start in range(0, len(answers), 512))
            return sum(len(encoding.ids) for part in parts for encoding in backend.encode_batch_fast(part))

        sizes = {"tokenizer alone": alone(), "prepare": prepared(1)}
        tools = {
            f"tokenizer alone, {args.workers} threads": alone,
            "prepare, 1 process": lambda: prepared(1),
            f"prepare, {args.workers} processes": lambda: prepared(args.workers),
        }
        seconds = interleaved(tools, args.rounds)
    if len(hashes) != 1:
        raise SystemExit(f"{len(hashes)} different results from the same rows. No speed is printed for a wrong result.")
    rows = []
    limit = [sizes["tokenizer alone"] / s for s in next(iter(seconds.values()))]
    for name, taken in seconds.items():
        tokens = sizes["tokenizer alone" if name.startswith("tokenizer") else "prepare"]
        speeds = [tokens / s for s in taken]
        shares = [speed / most for speed, most in zip(speeds, limit, strict=True)]
        rows.append([name, spread([speed / 1e3 for speed in speeds], 0), spread(shares)])
    print(f"{args.rows} chats of {CHARACTERS} characters, {sizes['prepare']:,} tokens, BPE of {args.vocab_size}")
    print(machine(args.workers, "tokenizers", "transformers"))
    print(table(["", "1000 tokens/s", "of the tokenizer alone"], rows))


if __name__ == "__main__":
    main()
