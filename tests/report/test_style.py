from difftune.report.compare import Group
from difftune.report.style import COLOURS, ramp, style_of


def test_a_kind_has_its_colour_whatever_stands_beside_and_a_second_recipe_a_dash():
    one, two, base = Group("a", "diff_v1", []), Group("b", "diff_v1", []), Group("c", "softmax", [])
    styles = style_of([one, base, two])
    assert styles["a"].colour == styles["b"].colour == COLOURS["diff_v1"] != styles["c"].colour
    assert styles["a"].dash == styles["c"].dash == "" != styles["b"].dash
    assert style_of([base])["c"] == styles["c"] and style_of([Group("d", "other", [])])["d"].colour == COLOURS[""]


def test_layers_go_from_light_to_dark():
    first, *_, last = (sum(map(int, ramp(n, 5)[4:-1].split(","))) for n in range(5))
    assert first > last and ramp(0, 1) == ramp(4, 5)
