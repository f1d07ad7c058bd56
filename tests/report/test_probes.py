import pytest

from difftune.report.compare import group_runs
from difftune.report.probes import attention_section, bits_section, cumulative_nll, needle_section, outlier_section
from difftune.report.runs import load_run
from tests.report.runs import write_run


def test_the_cumulative_nll_is_the_mean_over_documents_of_the_mean_so_far():
    documents = [{"num_tokens": 10, "sums": [10.0, 5.0]}, {"num_tokens": 10, "sums": [20.0, 5.0]}]
    assert cumulative_nll(documents) == [(5.0, pytest.approx(3.0)), (10.0, pytest.approx(2.0))]
    assert cumulative_nll([]) == []


def test_the_share_of_each_recipe_stands_beside_the_papers(tmp_path):
    metrics = {f"eval/noise/{name}": [(5, value)] for name, value in (("answer", 0.111), ("noise", 0.222))}
    metrics["eval/noise/signal_to_noise"] = [(5, 0.5)]
    groups = group_runs([load_run(write_run(tmp_path / "a", metrics))])
    section = attention_section(groups)
    assert "0.111" in section and "0.222" in section
    # Means of Table 3 over the depths.
    assert "0.320" in section and "0.510" in section
    assert outlier_section(groups) == needle_section(groups) == bits_section(groups, {}) == ""
