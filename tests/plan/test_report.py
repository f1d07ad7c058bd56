"""The plan as people and programs read it."""

import io
import json

import pytest
from rich.console import Console

from difftune.plan.report import gib, plan_values, print_plan
from difftune.plan.stages import GIB, StagePlan, Suggestion
from difftune.plan.step import Machine, Moment


def plan(available: int) -> StagePlan:
    machine = Machine(True, 2, 80 * GIB, "H100", 0.4, "fsdp")
    moments = [
        Moment("backward of block 3", 10 * GIB, 2 * GIB, 20 * GIB, GIB, 5 * GIB),
        Moment("evaluation a", 10 * GIB, 0, 20 * GIB, 0, 0, 3 * GIB),
        Moment("evaluation b", 10 * GIB, 0, 20 * GIB, 0, 0, 4 * GIB),
    ]
    return StagePlan(
        stage="main",
        machine=machine,
        available=available,
        parameters={"total": 1000, "trainable": 900, "lambda": 8},
        moments=moments,
        kept_a_block=2**20,
        kept_without_checkpointing=2**23,
        kept_with_checkpointing=2**20,
        logits=2**26,
        all_logits=2**33,
        flops_per_token=2.5e10,
        tokens_a_step=4096,
        hours=12.5,
        assumptions=["this", "that"],
        suggestions=[Suggestion("data.seq_len=1", 8 * GIB, 30 * GIB, "other data")],
    )


def printed(found: StagePlan, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_plan(found, console)
    return console.file.getvalue()


def test_the_table_names_the_peak_and_its_parts_within_80_columns() -> None:
    text = printed(plan(78 * GIB))
    assert "peak 38.0 GiB in backward of block 3: fits in 78.0 GiB, 40.0 GiB to spare" in text
    row = next(line for line in text.splitlines() if line.strip().startswith("backward of block 3"))
    assert row.split()[4:] == ["10.0", "2.00", "20.0", "1.00", "5.00", "38.0"]
    assert "…" not in text and "evaluation b" in text and "evaluation a" not in text
    assert "12.5 hours" in text and "40% of the peak of H100 (assumed" in text and "assumed: this; that" in text
    assert "data.seq_len=1" not in text


def test_what_does_not_fit_is_followed_by_what_to_change() -> None:
    text = printed(plan(32 * GIB))
    assert "does not fit in 32.0 GiB, 6.00 GiB too many" in text
    assert "data.seq_len=1  saves 8.00 GiB, peak 30.0: fits (the price: other data)" in text


def test_programs_get_bytes_and_the_verdict() -> None:
    values = json.loads(json.dumps(plan_values(plan(32 * GIB))))
    assert (values["peak_bytes"], values["peak_where"], values["fits"]) == (38 * GIB, "backward of block 3", False)
    assert [moment["total"] for moment in values["moments"]] == [38 * GIB, 33 * GIB, 34 * GIB]


@pytest.mark.parametrize(("count", "text"), [(0, "0.0000"), (GIB // 8, "0.12"), (12 * GIB, "12.0")])
def test_figures_have_the_digits_that_matter(count: int, text: str) -> None:
    assert gib(count) == text
