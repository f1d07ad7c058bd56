import pytest

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'difftune[report]'")
from difftune.report.attention_maps import draw_attention
from difftune.report.figures import FIGURES, save_figure

SHARES = {
    "answer_depth_000": 0.2,
    "noise_depth_000": 0.5,
    "answer_depth_100": 0.3,
    "noise_depth_100": 0.4,
    "answer": 0.25,
}
MAP = [[1.0, 0.0], [0.25, -0.5]]


def test_shares_and_the_maps_of_a_head_are_drawn_side_by_side(tmp_path):
    maps = {"layer": 1, "head": 0, "answer": [1], "first": MAP, "second": MAP, "difference": MAP}
    baseline = {"layer": 1, "head": 0, "answer": [1], "first": MAP}
    figure = draw_attention({"diff": {**SHARES, "maps": maps}, "softmax": {**SHARES, "maps": baseline}})
    shown = [axes for axes in figure.axes if axes.get_visible()]
    titles = [axes.get_title() for axes in shown]
    assert titles == [
        "diff", "A1, layer 1, head 0", "A2, layer 1, head 0", "A1 - lambda A2, layer 1, head 0",
        "softmax", "A, layer 1, head 0",
    ]  # fmt: skip
    assert list(shown[0].lines[0].get_ydata()) == [0.2, 0.3] and list(shown[0].lines[0].get_xdata()) == [0, 100]
    # The root of the magnitude, with its sign.
    assert shown[1].images[0].get_array().tolist()[1] == pytest.approx([0.5, -(0.5**0.5)])
    save_figure("attention_noise", {"diff": {**SHARES, "maps": None}}, tmp_path / "a" / "maps.png")
    assert (tmp_path / "a" / "maps.png").read_bytes().startswith(b"\x89PNG") and "attention_noise" in FIGURES
