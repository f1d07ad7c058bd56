"""Wrong inputs, a few hundred: each has to end with exit code 2 and one message, and to leave nothing behind.

    python -m tests.bad_inputs [AREA ...] [--match TEXT] [--failures FILE]

Exit code 0: all of them did. The others are shown, and written to a file with all that they printed.
"""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.bad_inputs import AREAS
from tests.bad_inputs.runner import Verdict, import_everything, make_folders, run_cases


def main() -> int:
    """Run areas, print a summary, write the failures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("areas", nargs="*", choices=[[], *AREAS], default=[], help="all of them by default")
    parser.add_argument("--match", default="", help="only cases whose name holds this")
    parser.add_argument("--failures", type=Path, help="file for the failures and what they printed")
    parser.add_argument("--show", action="store_true", help="print the message of every case")
    options = parser.parse_args()

    import_everything()
    verdicts: dict[str, list[Verdict]] = {}
    with TemporaryDirectory(prefix="difftune-bad-inputs-made-") as made:
        chosen = {
            area: [case for case in cases if options.match in case.name]
            for area, cases in AREAS.items()
            if not options.areas or area in options.areas
        }
        if any(case.copies for cases in chosen.values() for case in cases):
            make_folders(Path(made))
        for area, cases in chosen.items():
            verdicts[area] = run_cases(cases, Path(made))
            for verdict in verdicts[area]:
                if verdict.faults:
                    print(f"FAILED {area}: {verdict.case.name}: {'; '.join(verdict.faults)}", flush=True)
                elif options.show:
                    print(f"ok {area}: {verdict.case.name}: {verdict.output.strip()}", flush=True)
    failed = [(area, verdict) for area, found in verdicts.items() for verdict in found if verdict.faults]
    for area, found in verdicts.items():
        slowest = max((verdict.seconds for verdict in found), default=0.0)
        bad = sum(bool(verdict.faults) for verdict in found)
        print(f"{area:<14} {len(found):>4} inputs, {bad} failed, slowest {slowest:.1f} s")
    kinds = Counter(fault.split(":")[0].split(", such")[0] for _, verdict in failed for fault in verdict.faults)
    total = sum(map(len, verdicts.values()))
    print(f"{total} wrong inputs, {len(failed)} failed" + "".join(f"; {kind}: {n}" for kind, n in kinds.most_common()))
    if options.failures is not None:
        text = "".join(
            f"== {area}: {verdict.case.name}: {'; '.join(verdict.faults)}\n$ difftune {' '.join(verdict.case.argv)}\n"
            f"{verdict.output}\n"
            for area, verdict in failed
        )
        options.failures.write_text(text, encoding="utf-8", errors="backslashreplace")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
