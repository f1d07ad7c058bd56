import pytest

from difftune.evaluation.activations import PAPER as ACTIVATIONS
from difftune.evaluation.attention_noise import PAPER as NOISE
from difftune.evaluation.quantization import PAPER as BITS
from difftune.report.paper import OURS, paper_charts, paper_figures


def test_the_figures_say_where_they_are_from_and_are_all_drawn():
    page = paper_charts()
    assert "2410.05258" in page and page.count('class="chart"') == 8 and page.count('class="heat"') == 2


@pytest.mark.parametrize("model", ["diff", "transformer"])
def test_the_numbers_beside_the_tables_of_the_terminal_are_the_same(model):
    data, kind = paper_figures(), OURS[model]
    table = data["table5_activations"]
    for what in ("logits", "hidden"):
        assert dict(zip(table["ranks"], table[model][what], strict=True)) == ACTIVATIONS[kind][what]
    for name in ("answer", "noise"):
        assert tuple(data["table3_attention_by_depth"][model][name]) == NOISE[kind][name]
    assert {int(bits): value for bits, value in data["fig8_hellaswag_vs_bits"][model]} == BITS[kind]


def test_known_values_of_the_text_are_in_the_figures():
    data = paper_figures()
    ends = [data["fig9_math_avg_vs_tokens_B"][model][-1][1] for model in ("diff", "transformer")]
    assert ends[0] - ends[1] == pytest.approx(11.3)  # "11.3%" in Appendix C
    cell = {m: data["fig5_needle_8_of_which_1"][m][1][7] for m in ("diff", "transformer")}
    assert cell["diff"] - cell["transformer"] == pytest.approx(0.76)  # "76%" at 25% depth and 64K
