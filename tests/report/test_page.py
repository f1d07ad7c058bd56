import json
import re

import pytest

from difftune.cli import main
from difftune.report.page import render_report, write_report
from tests.report.browser import dump, watched
from tests.report.runs import write_metrics, write_run

NEEDLE = [
    {
        "task": "needle",
        "index": i,
        "length": length,
        "depth": depth,
        "found": [depth > 0],
        "text": "7",
        "numbers": {"A": "7"},
    }
    for i, (length, depth) in enumerate((n, d) for n in (512, 1024) for d in (0.0, 0.5, 1.0))
]
MAPS = {"layer": 1, "head": 0, "lambda": 0.5, "answer": [1], "first": [[1.0, 0.0], [0.5, 0.5]],
        "second": [[1.0, 0.0], [0.9, 0.1]], "difference": [[0.5, 0.0], [0.05, 0.45]]}  # fmt: skip
SAMPLES = [
    {"task": "sums", "index": 0, "question": "1+1 <b>", "text": "2", "gold": "2", "answer": "2", "verdict": "correct"},
    {"task": "sums", "index": 1, "question": "2+2", "text": "<script>boom()</script>", "gold": "4", "verdict": "wrong"},
    *NEEDLE,
    {"task": "books", "index": 0, "num_tokens": 100, "sums": [250.0, 150.0]},
    {"task": "noise", "index": 0, "maps": MAPS},
]

SECTIONS = [
    "Results",
    "Loss",
    "Evaluations during training",
    "Lambda by layer",
    "Retrieval by depth",
    "Many-shot learning",
    "Likelihood by position",
    "Attention to the answer",
    "Outliers",
    "few bits",
    "lm-evaluation-harness",
    "Speed",
    "Samples",
    "How the runs differ",
    "The paper&#x27;s figures",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of two kinds, with every kind of evaluation."""
    folder = tmp_path_factory.mktemp("runs")
    paths = []
    for kind in ("diff_v1", "softmax"):
        for seed in (0, 1):
            metrics = {
                "train/loss": [(step, 8 / (1 + step)) for step in range(1, 60)],
                "train/grad_norm": [(step, 1.0 + seed) for step in range(1, 60)],
                "perf/tokens_per_s": [(step, 5000.0) for step in range(1, 60)],
                "eval/sums/accuracy": [(0, 0.1), (30, 0.4), (59, 0.9 - seed / 10)],
                "eval/noise/answer": [(59, 0.3)],
                "eval/noise/noise": [(59, 0.2)],
                "eval/noise/signal_to_noise": [(59, 1.5)],
                "eval/sums_bits/accuracy_16bit": [(59, 0.9)],
                "eval/sums_bits/accuracy_4bit": [(59, 0.5)],
                "eval/zero/hellaswag_acc_norm": [(59, 0.4 + seed / 20)],
                **{
                    f"eval/trec/{name}": [(59, value - seed / 20)]
                    for name, value in [
                        ("chance", 1 / 6),
                        *[(f"accuracy_{n}", 0.4 + n / 4000) for n in (6, 60, 300, 1200)],
                        *[("accuracy", 0.7), ("best", 0.75), ("worst", 0.5), ("margin", 0.25)],
                    ]
                },
                **{
                    f"eval/out/{what}_{rank}": [(59, 12.5)]
                    for what in ("logits", "hidden")
                    for rank in ("top_1", "median")
                },
            }
            if kind == "diff_v1":
                metrics |= {f"lambda/layer_{n:02d}": [(s, 0.2 + n / 10) for s in range(60)] for n in (0, 1)}
            model = {"attention": kind, "path": None}
            path = write_run(folder / f"{kind}-{seed}", metrics, seed=seed, model=model)
            (path / "samples").mkdir()
            (path / "samples" / "main-59.jsonl").write_text("".join(json.dumps(line) + "\n" for line in SAMPLES))
            paths.append(str(path))
    return paths


def test_the_page_has_every_section_and_no_address_outside(runs):
    page = render_report(runs)
    for name in SECTIONS:
        assert name in page
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*['\"]?\s*(?:https?:)?//", page)
    assert "0.8500 ±" in page or "0.85 ±" in page
    assert "verdict good" in page and "verdict bad" in page


def test_what_a_model_wrote_is_shown_and_not_run(runs):
    page = render_report(runs)
    assert "<script>boom()" not in page and "&lt;script&gt;boom()" in page and "1+1 &lt;b&gt;" in page


def test_a_run_that_only_logged_a_loss_has_a_page(tmp_path):
    path = write_run(tmp_path / "bare", {"train/loss": [(1, 2.0)]})
    page = write_report([path], tmp_path / "out" / "page.html").read_text()
    assert "Loss" in page and "Lambda by layer" not in page and "Samples" not in page
    write_metrics(path, {"train/loss": [(2, None)]})
    assert "<svg" in render_report([path])


def test_the_command_writes_the_file_and_says_where(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["report", *runs, "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out) and out.read_text().startswith("<!doctype html>")
    assert main(["report", runs[0], runs[0]]) == 2 and "named twice" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "absent")]) == 2 and "no such folder" in capsys.readouterr().err


def test_a_browser_draws_every_chart_and_nothing_throws(runs, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(watched(render_report(runs)))
    found = re.search(r"REPORT(\{.*?\})END", dump(page, tmp_path / "profile"))
    assert found is not None, "the page did not load"
    seen = json.loads(found[1].replace("&amp;", "&"))
    assert seen["errors"] == [] and not seen["overflow"]
    assert seen["overlaps"] == [] and seen["labelled"], "both axes have a name, and every text can be read"
    assert seen["charts"] == seen["allCharts"] >= 16 and seen["curves"] >= 35
    # Each recipe's needle map and the paper's two; three maps of the differential recipe's head, and of the baseline's.
    assert seen["heats"] == 4 and seen["maps"] == seen["allMaps"] == 6
    assert seen["tip"].startswith("step ") and "diff_v1-0" in seen["tip"]


def test_the_watch_notices_an_error_and_a_request(runs, tmp_path):
    page = tmp_path / "page.html"
    broken = render_report(runs).replace(
        "</main>", "</main><script>missing()</script><img src='https://example.org/x.png'>"
    )
    page.write_text(watched(broken))
    found = re.search(r"REPORT(\{.*?\})END", dump(page, tmp_path / "profile"))
    assert found is not None
    errors = json.loads(found[1].replace("&amp;", "&"))["errors"]
    assert any("missing" in error for error in errors) and any("policy" in error for error in errors)


def test_the_page_begins_with_what_changed(tmp_path):
    path = write_run(tmp_path / "a", {"eval/sums/accuracy": [(0, 0.0), (9, 1.0)]})
    (path / "samples").mkdir()
    for step, verdict in ((0, "wrong"), (9, "correct")):
        sample = {"question": "1+1 <b>", "gold": "2", "text": f"at {step}", "verdict": verdict}
        lines = [json.dumps({"task": "sums", "index": index, **sample}) + "\n" for index in range(3)]
        (path / "samples" / f"main-{step}.jsonl").write_text("".join(lines))
    page = render_report([path])
    assert page.index("What changed") < page.index("Results")
    assert 'class="verdict good">better' in page and "at 0 <small>wrong" in page and "1+1 &lt;b&gt;" in page


def test_the_papers_figures_are_folded_and_have_a_legend(runs):
    page = render_report(runs)
    folded = page[page.index('id="paper"') :]
    assert folded.index("<details><summary>") < folded.index("<svg")
    assert ">DIFF<" in folded and ">Transformer<" in folded
