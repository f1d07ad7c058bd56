import pytest

from difftune.evaluation.activations import PAPER as ACTIVATIONS
from difftune.evaluation.attention_noise import PAPER as NOISE
from difftune.evaluation.hallucination import PAPER as HALLUCINATION
from difftune.evaluation.many_shot import PAPER as ORDERS
from difftune.evaluation.math import PAPER as MATHS
from difftune.evaluation.needle import PAPER_4K, PAPER_64K
from difftune.evaluation.quantization import PAPER as BITS
from difftune.report.paper import OURS, paper_charts, paper_figures


def test_the_figures_say_where_they_are_from_and_are_all_drawn():
    page = paper_charts()
    assert "2410.05258" in page and page.count('class="chart"') == 8 and page.count('class="heat"') == 2
    for cell in ("gsm8k", "0.426", "6, 2", "xsum", "trec, alternating", "0.567", "OpenLLaMA-3B-v2, 1T tokens"):
        assert f">{cell}</t" in page, cell


@pytest.mark.parametrize("model", ["diff", "transformer"])
def test_the_numbers_beside_the_tables_of_the_terminal_are_the_same(model):
    data, kind = paper_figures(), OURS[model]
    table = data["table5_activations"]
    for what in ("logits", "hidden"):
        assert dict(zip(table["ranks"], table[model][what], strict=True)) == ACTIVATIONS[kind][what]
    for name in ("answer", "noise"):
        assert tuple(data["table3_attention_by_depth"][model][name]) == NOISE[kind][name]
    assert {int(bits): value for bits, value in data["fig8_hellaswag_vs_bits"][model]} == BITS[kind]
    for name, known in (("fig10_math_by_set", MATHS), ("section_3_6_hallucination", HALLUCINATION)):
        assert dict(zip(data[name]["sets"], data[name][model], strict=True)) == known[kind]
    few = data["table2_needles_4k"]
    assert dict(zip(map(tuple, few["needles_and_queries"]), few[model], strict=True)) == PAPER_4K[kind]
    many = data["fig5_needle_8_of_which_1"]
    means = [sum(column) / 5 for column in zip(*many[model], strict=True)]
    assert PAPER_64K[kind] == pytest.approx(dict(zip(many["lengths"], means, strict=True)), abs=0.006)
    figures = {
        ("trec", "random"): "fig7a_trec_random_order_seeds",
        ("trec", "alternating"): "fig7b_trec_alternate_by_class_seeds",
        ("trec_fine", "random"): "fig11b_trecfine_seeds",
        ("banking77", "random"): "fig11c_banking77_seeds",
        ("clinic150", "random"): "fig11d_clinic150_seeds",
    }
    for name, figure in figures.items():
        values = [value / 100 for _, value in data[figure][model]]
        mean, best, worst = sum(values) / len(values), max(values), min(values)
        assert ORDERS[name][kind] == pytest.approx((mean, best, worst), abs=6e-4), name


def test_known_values_of_the_text_are_in_the_figures():
    data = paper_figures()
    ends = [data["fig9_math_avg_vs_tokens_B"][model][-1][1] for model in ("diff", "transformer")]
    assert ends[0] - ends[1] == pytest.approx(11.3)  # "11.3%" in Appendix C
    cell = {m: data["fig5_needle_8_of_which_1"][m][1][7] for m in ("diff", "transformer")}
    assert cell["diff"] - cell["transformer"] == pytest.approx(0.76)  # "76%" at 25% depth and 64K
