import json
import math
import random

import pytest

from difftune.report.headline import Change, headline_html, headline_of, headline_text, loading_lines, paired_change
from difftune.report.runs import load_run
from tests.report.runs import write_metrics, write_run


def write_samples(path, name, samples):
    (path / "samples").mkdir(exist_ok=True)
    (path / "samples" / f"{name}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def graded(verdicts, text="t"):
    return [
        {"task": "sums", "index": i, "question": f"q{i}", "gold": str(i), "text": f"{text}{i}", "verdict": verdict}
        for i, verdict in enumerate(verdicts)
    ]


def test_the_interval_covers_the_change_of_a_ratio_as_often_as_it_says():
    rng = random.Random(0)
    covered = 0
    for _ in range(400):
        weights = [rng.choice((10, 20, 200)) for _ in range(60)]
        before = [weight * rng.gauss(2.0, 0.3) for weight in weights]
        after = [value - weight * rng.gauss(0.1, 0.2) for value, weight in zip(before, weights, strict=True)]
        low, high = paired_change(before, after, weights)
        covered += low <= -0.1 <= high
    assert 0.90 <= covered / 400 <= 0.985


def test_items_that_did_not_change_have_an_interval_of_no_width_and_one_item_tells_nothing():
    assert paired_change([1, 2], [1, 2], [1, 1]) == (0.0, 0.0)
    assert paired_change([1], [2], [1]) == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("figure", "before", "after", "interval", "verdict"),
    [
        ("accuracy", 0.1, 0.5, (0.3, 0.5), "better"),
        ("accuracy", 0.5, 0.1, (-0.5, -0.3), "worse"),
        ("nll", 2.0, 1.5, (-0.6, -0.4), "better"),
        ("nll", 1.5, 2.0, (0.4, 0.6), "worse"),
        ("accuracy", 0.5, 0.6, (-0.1, 0.3), "no difference shown"),
        ("accuracy", 0.5, 0.6, None, "no interval is known"),
    ],
)
def test_better_is_said_only_where_the_interval_leaves_out_zero(figure, before, after, interval, verdict):
    change = Change("sums", figure, before, after, interval, 10)
    assert change.verdict == verdict and str(change).startswith(f"sums: {verdict}. {figure} {before:.3f} before")


def test_a_run_of_two_stages_is_compared_from_its_first_evaluation_to_its_last(tmp_path):
    path = write_run(tmp_path / "a", {"eval/sums/accuracy": [(0, 0.25), (10, 0.5)]}, stage="answers")
    write_metrics(path, {"eval/sums/accuracy": [(30, 0.75)], "eval/late/accuracy": [(30, 0.1)]}, "traces")
    write_samples(path, "answers-0", graded(["wrong", "wrong", "correct", "wrong"], "old"))
    write_samples(path, "answers-10", graded(["wrong", "correct", "correct", "wrong"], "middle"))
    write_samples(path, "traces-30", graded(["correct", "correct", "wrong", "correct"], "new"))
    found = headline_of(load_run(path))
    (change,) = found.changes
    assert (change.before, change.after, change.items) == (0.25, 0.75, 4)
    low, high = change.interval
    assert low < 0.5 < high
    # Two that became right, and the one that became wrong: not the best alone.
    assert [answer.verdicts for answer in found.answers] == [
        ("wrong", "correct"),
        ("wrong", "correct"),
        ("correct", "wrong"),
    ]
    text = headline_text(found)
    assert text.startswith("What changed\n  sums: no difference shown. accuracy 0.250 before, 0.750 after (+0.500")
    assert "before    old0   [wrong]" in text and "after     new0   [correct]" in text


def test_the_likelihood_of_documents_is_compared_by_token(tmp_path):
    path = write_run(tmp_path / "a", {"eval/books/nll": [(0, 2.0), (5, 1.0)]})
    for name, factor in (("main-0", 2.0), ("main-5", 1.0)):
        samples = [
            {"task": "books", "index": i, "num_tokens": n, "sums": [factor * n / 2] * 2} for i, n in enumerate((5, 50))
        ]
        write_samples(path, name, samples)
    (change,) = headline_of(load_run(path)).changes
    assert change.interval == pytest.approx((-1.0, -1.0)) and change.verdict == "better"
    assert "nats a token" in str(change)


def test_without_an_evaluation_before_training_there_is_no_headline(tmp_path):
    path = write_run(tmp_path / "a", {"eval/sums/accuracy": [(10, 0.5), (20, 0.6)], "train/loss": [(1, 2.0)]})
    write_samples(path, "main-10", graded(["wrong"]))
    write_samples(path, "main-20", graded(["correct"]))
    found = headline_of(load_run(path))
    assert found.changes == [] and found.answers == [] and headline_text(found) == "" and headline_html(found) == ""


def test_a_long_answer_keeps_its_beginning_and_its_end(tmp_path):
    path = write_run(tmp_path / "a", {"eval/sums/accuracy": [(0, 0.0), (9, 1.0)]})
    write_samples(path, "main-0", graded(["unparsed"], ""))
    write_samples(path, "main-9", graded(["correct"], "begin " + "x\n" * 300 + "end"))
    text = headline_text(headline_of(load_run(path)))
    after = next(line for line in text.splitlines() if "after     " in line)
    assert "begin" in after and "end0" in after and len(after) < 220


def test_an_exported_folder_is_shown_as_it_is_loaded(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "diffllama"}))
    assert loading_lines(folder)[1] == f'model = AutoModelForCausalLM.from_pretrained("{folder}")'
    (folder / "config.json").write_text(json.dumps({"model_type": "difftune", "auto_map": {}}))
    assert loading_lines(folder)[1].endswith(", trust_remote_code=True)")
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base"}))
    assert "load_model(" in loading_lines(folder)[1] and "adapter of base" in loading_lines(folder)[1]
