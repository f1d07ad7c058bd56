"""Seconds and memory of laying the documents of an epoch into rows, against placing one document after another.

python -m benchmarks.packing [--documents 1000000 4000000] [--seq-len 4096] [--rounds 3]

The lengths are drawn from a lognormal distribution with a median of 400 tokens and cut at the row. The baseline is the
same best fit a document at a time, with a Python list for each row. Below it: the flat arrays in memory; laid, written
to their file and mapped, as by the first process of a machine; and found there and mapped, as by every other one. Each
in processes of its own, the peak of resident memory beyond what it held before, which the lengths are part of. All
must come to the same rows.
"""

import argparse
import hashlib
import tempfile
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.common import PeakMemory, machine, report, run_child, spread, table
from difftune.data.packing import Rows, pack_best_fit
from difftune.data.row_cache import RowCache

WAYS = ("one by one, lists", "flat arrays", "flat arrays, written and mapped", "mapped from the file")


def one_by_one(lengths: np.ndarray, order: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing, a document at a time; of rows equally full the last one that became so is taken."""
    longest_first = order[np.argsort(-lengths[order], kind="stable")]
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for document, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room = rooms[at]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rows_by_room[room], rooms[at]
        rows[row].append(document)
        if left := room - length:
            if left not in rows_by_room:
                rows_by_room[left] = []
                insort(rooms, left)
            rows_by_room[left].append(row)
    return rows


def measure(way: str, documents: int, seq_len: int, folder: Path) -> None:
    """Lay the rows of one epoch in one way; report seconds, memory and the rows."""
    draw = np.random.default_rng(0)
    lengths = draw.lognormal(np.log(400), 0.8, documents).astype(np.int64).clip(1, seq_len)
    shuffled = np.random.default_rng(1)

    def lay() -> Rows:
        rows = pack_best_fit(lengths, shuffled.permutation(documents), seq_len)
        return rows.taken(shuffled.permutation(len(rows)))

    def lists() -> list[list[int]]:
        rows = one_by_one(lengths, shuffled.permutation(documents), seq_len)
        return [rows[row] for row in shuffled.permutation(len(rows))]

    def not_found() -> Rows:
        raise SystemExit("the rows were not found in their file")

    ways: dict[str, Callable[[], Rows | list[list[int]]]] = {
        WAYS[0]: lists,
        WAYS[1]: lay,
        WAYS[2]: lambda: RowCache(folder).rows(lengths, [], 0, lay),
        WAYS[3]: lambda: RowCache(folder).rows(lengths, [], 0, not_found),
    }
    peak = PeakMemory()
    start = time.perf_counter()
    rows = ways[way]()
    seconds, above = time.perf_counter() - start, peak.above_start_gib
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.asarray(row, dtype=np.int64).data)
        digest.update(b"|")
    padding = 1 - int(lengths.sum()) / (len(rows) * seq_len)
    report(seconds=seconds, above=above, rows=len(rows), digest=digest.hexdigest(), padding=padding)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[1_000_000, 4_000_000])
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.way:
        return measure(args.way, args.documents[0], args.seq_len, args.folder)
    lines = []
    for documents in args.documents:
        results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        with tempfile.TemporaryDirectory() as parent:
            for number in range(args.rounds):
                for way in WAYS:
                    arguments = ["--way", way, "--folder", f"{parent}/{number}", "--documents", str(documents)]
                    arguments += ["--seq-len", str(args.seq_len)]
                    results[way].append(run_child("benchmarks.packing", arguments, 1))
        if len({result["digest"] for found in results.values() for result in found}) != 1:
            raise SystemExit(
                "the ways do not agree on the rows. No speed is printed for a wrong result; run the tests."
            )
        for way, found in results.items():
            above = max(result["above"] for result in found) * 2**30
            seconds = spread([result["seconds"] for result in found])
            padding = f"{found[0]['rows']:,}, {found[0]['padding']:.1%}"
            lines.append([f"{documents:,}", padding, way, seconds, f"{above / 2**20:.0f}", f"{above / documents:.0f}"])
    print(f"rows of {args.seq_len} tokens; {machine(1)}, numpy {np.__version__}")
    print(table(["documents", "rows, padding", "", "seconds", "peak MiB above start", "bytes a document"], lines))


if __name__ == "__main__":
    main()
