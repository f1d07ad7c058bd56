import re

import pytest

from difftune.evaluation.lm_eval import PAPER
from difftune.report.compare import group_runs
from difftune.report.harness import harness_section
from difftune.report.paper import paper_figures
from difftune.report.runs import load_run
from tests.report.runs import write_run


def rows(page):
    """The cells of each row of a page's tables."""
    lines = re.findall(r"<tr[^>]*>(.*?)</tr>", page)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in lines]


def groups(tmp_path, **metrics):
    return group_runs([load_run(write_run(tmp_path / "a", {"train/loss": [(1, 2.0)], **metrics}))])


def test_ours_stand_above_the_papers_tables_task_by_task(tmp_path):
    section = harness_section(
        groups(
            tmp_path, **{"eval/lm_eval/hellaswag_acc": [(5, 0.511)], "eval/lm_eval/hellaswag_acc_norm": [(5, 0.622)]}
        )
    )
    heads, acc, norm, *paper = rows(section)
    place = heads.index("hellaswag")
    assert acc[0] == "Differential, V1, acc" and acc[place] == "0.511"
    assert norm[0] == "Differential, V1, acc_norm" and norm[place] == "0.622"
    assert acc[heads.index("piqa")] == "-" and acc[heads.index("mean")] == "-", "not measured"
    assert len(paper) == len(PAPER) and section.count("class=paper") == len(PAPER)
    by_name = {cells[0]: cells for cells in paper}
    assert by_name["paper, DIFF 3B, 350B tokens"][place] == "0.662"
    assert by_name["paper, Transformer 3B, 350B tokens"][heads.index("mean")] == "0.554"
    assert by_name["paper, StableLM-3B-4E1T, 1T tokens"][heads.index("boolq")] == "-"


def test_the_mean_is_of_all_seven(tmp_path):
    seven = {f"eval/zero/{task}_acc": [(5, 0.1 * n)] for n, task in enumerate(next(iter(PAPER.values())))}
    heads, ours, *_ = rows(harness_section(groups(tmp_path, **seven)))
    assert heads[-1] == "mean" and ours[-1] == "0.300"


def test_a_run_without_them_has_no_section(tmp_path):
    assert harness_section(groups(tmp_path, **{"eval/lm_eval/mmlu_acc": [(5, 0.3)]})) == ""


def test_the_terminal_and_the_page_have_the_same_numbers():
    data = paper_figures()["table1_and_table8_harness"]
    assert {
        name: {task: value for task, value in zip(data["tasks"], values, strict=True) if value is not None}
        for name, values in data["models"].items()
    } == PAPER


@pytest.mark.parametrize(
    ("model", "mean"),
    [
        ("DIFF 3B, 1T tokens", 60.6),
        ("OpenLLaMA-3B-v2, 1T tokens", 57.5),
        ("StableLM-base-alpha-3B-v2, 1T tokens", 56.8),
        ("DIFF 3B, 350B tokens", 56.2),
        ("Transformer 3B, 350B tokens", 55.4),
        ("DIFF 3B, 350B tokens, 5 shots", 58.0),
        ("Transformer 3B, 350B tokens, 5 shots", 56.4),
    ],
)
def test_the_means_are_those_that_the_paper_prints(model, mean):
    assert sum(PAPER[model].values()) / 7 == pytest.approx(mean, abs=0.051)
