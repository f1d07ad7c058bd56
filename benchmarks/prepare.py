"""Tokens a second of `difftune prepare`, against the tokenizer alone on the same texts in the same run.

python -m benchmarks.prepare [--workers 2] [--rows 4000] [--characters 8000] [--rounds 3]

The rows are chats like R1 traces: a question, and some thousand characters of Python's standard library as the answer.
The tokenizer is a byte-level BPE trained on that library. Reading, the chat template, the label mask and writing are
counted for difftune, and nothing of them for the tokenizer alone, which is the limit. Tokens of a CPU second, over all
threads and processes, tell less of what else the machine does. Then the peak of resident memory, in processes of their
own, with a quarter of the rows and with all of them: it must not depend on the rows.
"""

import argparse
import hashlib
import json
import os
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import PeakMemory, interleaved, machine, ratio, ratios, report, run_child, spread, table


def write_rows(path: Path, rows: int, characters: int) -> list[str]:
    """Write the chats; return their answers."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    answers = []
    with path.open("w") as stream:
        for n in range(rows):
            start = n * 977 % (len(text) - characters)
            answers.append(f"<think>\n{text[start : start + characters]}\n</think>\n\nThe answer is {n}.")
            turns = [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": answers[-1]}]
            stream.write(json.dumps({"messages": turns}) + "\n")
    return answers


def cpu_seconds() -> float:
    """Of this process and of its children that have ended; where the kernel counts in ticks, in steps of 10 ms."""
    import resource

    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def measure_memory(folder: Path, rows: int, workers: int) -> None:
    """Tokenise the first rows, and report the peaks of this process and of the largest of its children."""
    import resource

    from transformers import AutoTokenizer

    from difftune.data.sources import Source
    from difftune.data.token_cache import load_tokenized

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    peak = PeakMemory()
    load_tokenized(
        Source(str(folder / "rows.jsonl"), limit=rows), tokenizer, folder / f"memory-{rows}", workers=workers
    )
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    report(total=peak.total_gib, above=peak.above_start_gib, child=child)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--characters", type=int, default=8000, help="of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.memory:
        return measure_memory(Path(args.memory), args.rows, args.workers)
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
        answers = write_rows(file, args.rows, args.characters)
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
        tokenizer.save_pretrained(Path(folder) / "tokenizer")
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
        used: dict[str, list[float]] = {name: [] for name in tools}

        def counted(name: str, call: Callable[[], Any]) -> Callable[[], None]:
            def run() -> None:
                start = cpu_seconds()
                call()
                used[name].append(cpu_seconds() - start)

            return run

        seconds = interleaved({name: counted(name, call) for name, call in tools.items()}, args.rounds)
        peaks = [
            (rows, run_child("benchmarks.prepare", _memory_arguments(folder, rows, args.workers), 1))
            for rows in (max(1, args.rows // 4), args.rows)
        ]
    if len(hashes) != 1:
        raise SystemExit(f"{len(hashes)} different results from the same rows. No speed is printed for a wrong result.")
    rows = []
    limit = [ratio(sizes["tokenizer alone"], s) for s in next(iter(seconds.values()))]
    for name, taken in seconds.items():
        tokens = sizes["tokenizer alone" if name.startswith("tokenizer") else "prepare"]
        speeds = [ratio(tokens, s) for s in taken]
        shares = ratios(speeds, limit)
        # The first call was not timed.
        cpu = used[name][1:]
        a_second = spread([tokens / s / 1e3 for s in cpu], 0) if all(cpu) else "too short to tell"
        rows.append([name, spread([speed / 1e3 for speed in speeds], 0), spread(shares), a_second])
    print(f"{args.rows} chats of {args.characters} characters, {sizes['prepare']:,} tokens, BPE of {args.vocab_size}")
    print(machine(args.workers, "tokenizers", "transformers"))
    print(table(["", "1000 tokens/s", "of the tokenizer alone", "1000 tokens a CPU second"], rows))
    memory = [
        [f"{count:,}", *(f"{peak[name] * 1024:.0f}" for name in ("total", "above", "child"))] for count, peak in peaks
    ]
    print(table(["rows", "peak MiB of the first process", "above its start", "of the largest worker"], memory))


def _memory_arguments(folder: str, rows: int, workers: int) -> list[str]:
    return ["--memory", folder, "--rows", str(rows), "--workers", str(workers)]


if __name__ == "__main__":
    main()
