import json
from pathlib import Path
from typing import Any

import pytest

from difftune.report.figures import FIGURES, draw_heat_map, draw_many_shot, draw_position_nll, main, read_results

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'difftune[report]'")

NLL = {"kind": "nll", "positions": [10, 20], "cumulative": [3.0, 2.5], "spread": [None, None], "by_bin": [3.0, 2.0]}
NEEDLE = {"kind": "needle", "lengths": [100, 200], "depths": [0.0, 1.0], "cells": [[1.0, None], [0.5, 0.25]]}
POINTS = [{"shots": 6, "accuracies": [0.5, 0.7], "n": 10}, {"shots": 12, "accuracies": [0.9], "n": 10}]
MANY = {"kind": "many_shot", "by_shots": POINTS, "chance": 1 / 6}


def folder(path: Path, **tasks: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "results.json").write_text(json.dumps({"model": path.name, "tasks": tasks}))
    return path


def test_curves_of_two_models_are_in_one_picture() -> None:
    (axes,) = draw_position_nll({"diff": NLL, "softmax": {**NLL, "cumulative": [3.2, 2.9]}}).axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[3.0, 2.5], [3.2, 2.9]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["diff", "softmax"]


def test_a_heat_map_has_a_number_in_every_cell_that_was_measured() -> None:
    figure = draw_heat_map({"diff": NEEDLE, "softmax": NEEDLE})
    maps = figure.axes[:2]
    assert [text.get_text() for text in maps[0].texts] == ["1.00", "", "0.50", "0.25"]
    assert [axes.get_title() for axes in maps] == ["diff", "softmax"]
    assert [label.get_text() for label in maps[1].get_yticklabels()] == ["0%", "100%"]


def test_many_shot_shows_the_mean_over_the_orders() -> None:
    (axes,) = draw_many_shot({"diff": MANY}).axes
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([0.6, 0.9])


@pytest.mark.parametrize("result", [NLL, NEEDLE, MANY], ids=lambda result: result["kind"])
def test_the_command_writes_a_picture_of_each_kind(result: dict[str, Any], tmp_path: Path) -> None:
    folders = [str(folder(tmp_path / name, books=result)) for name in ("diff", "softmax")]
    png = tmp_path / "out" / "a.png"
    main([*folders, "--task", "books", "--png", str(png)])
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 5000
    assert result["kind"] in FIGURES


def test_what_cannot_be_drawn_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = folder(tmp_path / "a", books=NLL), folder(tmp_path / "b", books={"kind": "math"}, other=NLL)
    with pytest.raises(ValueError, match="a has no results of 'other'; there are books"):
        read_results([b, a], "other")
    with pytest.raises(ValueError, match="'books' is of the kind math and nll: there is a picture of nll, needle"):
        read_results([a, b], "books")
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--task", "x", "--png", "x.png"])
    assert "results.json" in capsys.readouterr().err
