import json
import re

import pytest

from difftune.report.compare import group_runs
from difftune.report.many_shot import many_shot_section
from difftune.report.runs import load_run
from difftune.report.style import style_of
from tests.report.runs import write_run
from tests.report.test_harness import rows

TASK = {"kind": "many_shot", "name": None, "set": "trec", "order": "alternating", "orders": 3}


def figures(task="trec", **further):
    metrics = {"chance": 1 / 6, "accuracy": 0.7, "accuracy_6": 0.5, "accuracy_120": 0.7, **further}
    return {f"eval/{task}/{name}": [(5, value)] for name, value in metrics.items()}


def section(tmp_path, metrics, task=TASK):
    path = write_run(tmp_path / "a", metrics, evaluation={"tasks": [task]})
    groups = group_runs([load_run(path)])
    return many_shot_section(groups, style_of(groups))


def test_accuracy_is_a_curve_over_the_demonstrations_beside_the_papers(tmp_path):
    page = section(tmp_path, figures())
    ours, paper = page.split("<figure>")[1:]
    assert 'data-name="Differential, V1"' in ours and 'data-name="chance"' in ours and 'data-x="demonstrations"' in ours
    (points,) = re.findall(r'data-name="Differential, V1" data-points=\'(.*?)\'', ours)
    assert [point.split("&quot;")[1::2] for point in points.split("], [")] == [["6", "0.5"], ["120", "0.7"]]
    assert "Fig. 6a" in paper and 'data-name="paper, DIFF"' in paper and 'data-name="paper, Transformer"' in paper


def test_best_and_worst_order_stand_above_the_papers_of_the_same_set_and_kind_of_order(tmp_path):
    page = section(tmp_path, figures(best=0.8, worst=0.6, margin=0.2))
    heads, ours, diff, transformer = rows(page)
    assert heads[1:] == ["demonstrations", "orders", "mean", "best", "worst", "margin"]
    assert ours == ["Differential, V1", "120", "3", "0.7", "0.8", "0.6", "0.2"]
    # Fig. 7b: 30 orders that alternate by class.
    assert diff == ["paper, DIFF 3B", "64K tokens", "30", "0.899", "0.967", "0.833", "0.134"]
    assert transformer == ["paper, Transformer 3B", "64K tokens", "30", "0.659", "0.867", "0.300", "0.567"]
    assert page.count("class=paper") == 2


def test_a_single_order_has_no_table_and_a_set_of_ones_own_no_paper(tmp_path):
    assert "<table>" not in section(tmp_path / "one", figures())
    own = {**TASK, "set": None, "name": "tickets"}
    page = section(tmp_path / "own", figures("tickets", best=0.8, worst=0.6, margin=0.2), own)
    assert "paper," not in page and "<table>" in page and page.count('class="chart"') == 1


@pytest.mark.parametrize("order", ["random", "alternating"])
def test_a_folder_of_results_tells_its_sets_by_its_settings(tmp_path, order):
    path = write_run(tmp_path / "a", figures("mine", best=0.8, worst=0.6, margin=0.2))
    (path / "config.yaml").unlink()
    settings = {"kind": "many_shot", "set": "trec", "order": order, "orders": 2}
    (path / "settings.json").write_text(json.dumps({"model": "m", "tasks": {"mine": settings}}))
    groups = group_runs([load_run(path)])
    page = many_shot_section(groups, style_of(groups))
    assert (
        "Fig. 6a" in page and ("0.567" in page) == (order == "alternating") and ("0.190" in page) == (order == "random")
    )


def test_lengths_of_needles_are_no_demonstrations(tmp_path):
    needle = {f"eval/needle/{name}": [(5, 0.5)] for name in ("accuracy", "accuracy_512")}
    assert section(tmp_path, needle) == ""
