import base64
import math
import re
import zlib

import pytest

from difftune.report.charts import (
    MOST_POINTS,
    Line,
    heat_map,
    line_chart,
    log_ticks,
    map_picture,
    nice_ticks,
    short,
    thin,
)


def curve(points, **options):
    return line_chart([Line("a <run>", points, "#123")], x_label="step", y_label="loss", **options)


def test_a_curve_goes_from_the_left_to_the_right_and_larger_is_higher():
    svg = curve([(0, 1.0), (10, 2.0)])
    (path,) = re.findall(r' d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', svg)
    x0, y0, x1, y1 = map(float, path)
    assert x0 == 52 and x1 == 486 and y0 > y1 and "a &lt;run&gt;" in svg


def test_a_number_that_is_not_finite_is_a_gap():
    svg = curve([(0, 1.0), (1, 2.0), (2, math.nan), (3, 2.0), (4, 1.0)])
    (path,) = re.findall(r' d="([^"]+)"', svg)
    assert path.count("M") == 2 and "nan" not in svg


def test_nothing_to_draw_is_no_chart_and_one_point_is_a_dot():
    assert curve([]) == "" and curve([(0, math.nan)]) == ""
    assert curve([(3, 5.0)]).count("<circle") == 1


def test_a_logarithmic_axis_needs_numbers_above_zero():
    assert ">0.1<" in curve([(0, 10.0), (1, 0.01)], log_y=True)
    assert ">0.1<" not in curve([(0, 10.0), (1, 0.0)], log_y=True)


def test_long_curves_are_means_of_neighbours():
    points = [(float(n), float(n % 2)) for n in range(4 * MOST_POINTS)]
    thinned = thin(points)
    assert len(thinned) == MOST_POINTS and {y for _, y in thinned} == {0.5} and thinned[0][0] == 1.5


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.0071, 0.0093), (-3, 12345), (2.99, 3.01)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 7 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert log_ticks(-2, 1)[0] == 0.01 and log_ticks(0, 1) == [1, 2, 5, 10]


def test_numbers_are_short():
    assert [short(v) for v in (0.001234, 9999, 15000, 3.2e9, -0.5)] == ["0.00123", "9999", "15k", "3.2B", "-0.5"]


def test_a_heat_map_shows_each_share_and_leaves_gaps():
    svg = heat_map(["0%", "100%"], ["1K"], [[0.25], [math.nan]], x_label="length", y_label="depth")
    assert svg.count("<rect") == 1 and ">0.25<" in svg and "100%" in svg


def test_a_map_is_a_picture_of_its_numbers():
    image = map_picture([[1.0, 0.0], [-1.0, 0.25]], 1.0, "A1")
    data = base64.b64decode(re.findall(r"base64,([^\"]+)", image)[0])
    assert data.startswith(b"\x89PNG")
    start = data.index(b"IDAT") + 4
    pixels = zlib.decompress(data[start : start + int.from_bytes(data[start - 8 : start - 4], "big")])
    assert (
        pixels[1:4] == bytes((24, 66, 140)) and pixels[4:7] == b"\xff\xff\xff" and pixels[8:11] == bytes((176, 44, 38))
    )


def test_an_interval_is_a_bar_that_the_axis_makes_room_for():
    line = Line("a", [(0.0, 1.0), (1.0, 2.0)], "#123", halves=[3.0, math.nan])
    svg = line_chart([line], x_label="bits", y_label="accuracy")
    (bar,) = re.findall(r'<line class="bar" x1="([\d.]+)" x2="\1" y1="([\d.]+)" y2="([\d.]+)"', svg)
    (path,) = re.findall(r' d="M([\d.]+) ([\d.]+)L', svg)
    assert bar[0] == path[0] and float(bar[1]) > float(path[1]) > float(bar[2]) >= 28
    assert float(bar[1]) - float(path[1]) == pytest.approx(float(path[1]) - float(bar[2]), abs=0.2)
    assert 'class="bar"' not in curve([(0, 1.0), (1, 2.0)])


def test_both_axes_are_named():
    for svg in (curve([(0, 1.0), (1, 2.0)]), heat_map(["0%"], ["1K"], [[0.5]], x_label="step", y_label="loss")):
        assert re.findall(r'class="label"[^>]*>(\w+)<', svg) == ["step", "loss"]


@pytest.mark.parametrize(("low", "high"), [(2.31, 2.64), (0.11, 0.19), (6.0, 9.5), (1.0, 1.0)])
def test_a_logarithmic_axis_within_a_decade_has_numbers(low, high):
    svg = curve([(0, high), (1, low)], log_y=True)
    values = [float(text) for text in re.findall(r'text-anchor="end">([\d.]+)<', svg)]
    assert len(values) >= 3 and values == sorted(values)


def test_a_share_is_drawn_within_0_and_1_also_where_it_never_changes():
    def ends(*values):
        svg = curve(list(enumerate(values)), bounds=(0.0, 1.0))
        return [float(text) for text in re.findall(r'text-anchor="end">(-?[\d.]+)<', svg)]

    for values in ((0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (0.5, 0.5)):
        assert all(0 <= tick <= 1 for tick in ends(*values)), values
    assert max(ends(0.0, 0.0)) == 1.0
    assert min(float(t) for t in re.findall(r'text-anchor="end">(-?[\d.]+)<', curve([(0, 0.0), (1, 0.0)]))) < 0


def test_a_mark_stands_where_it_belongs_and_its_word_stays_inside():
    svg = curve([(0, 1.0), (100, 2.0)], marks=[(0.0, "first <stage>"), (90.0, "second")])
    places = [float(x) for x in re.findall(r'class="mark" x1="([\d.]+)"', svg)]
    assert places == [52.0, 442.6] and "first &lt;stage&gt;" in svg
    words = re.findall(r'x="([\d.]+)" y="37" text-anchor="(\w+)">(?:first|second)', svg)
    assert words == [("56.0", "start"), ("438.6", "end")]
