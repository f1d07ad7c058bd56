import json

import pytest

from difftune.config import load_config
from difftune.tasks.base import Defaults
from difftune.tasks.hallucination import HallucinationTaskConfig

DEFAULTS = Defaults(max_new_tokens=7, batch_size=3, temperature=0.0, top_p=1.0, num_samples=1, seed=4)


def test_the_columns_of_the_public_sets_are_read(tmp_path):
    file = tmp_path / "set.jsonl"
    rows = [
        {"article": "a", "highlights": "h", "id": "x"},
        {"context": "c", "input": "q?", "answers": ["1", "2"], "_id": "y"},
        {"document": "d", "summary": "s"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = HallucinationTaskConfig(path=str(file)).build(DEFAULTS)
    assert [(s.id, s.document, s.question, s.gold) for s in task.sources] == [
        ("x", "a", None, ["h"]), ("y", "c", "q?", ["1", "2"]), ("2", "d", None, ["s"]),
    ]  # fmt: skip
    assert (task.name, task.max_new_tokens) == ("set", 7) and "no judge" in task.judge.name
    file.write_text(json.dumps({"title": "t"}) + "\n")
    with pytest.raises(ValueError, match="needs a text in one of document"):
        HallucinationTaskConfig(path=str(file)).build(DEFAULTS)


def test_an_endpoint_needs_its_address_and_keeps_what_it_answered(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="judge=endpoint needs its address"):
        load_config(
            None,
            ["model.path=m", "evaluation.tasks=[{kind: hallucination, path: x, judge: endpoint}]"],
            command="evaluate",
        )
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps({"document": "d", "summary": "s"}) + "\n")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    task = HallucinationTaskConfig(path=str(file), judge="endpoint", url="http://localhost:1/v1").build(DEFAULTS)
    assert task.judge.api_key == "k" and task.judge.cache == tmp_path / "difftune" / "judge" / "judgements.jsonl"
    assert task.cache == tmp_path / "difftune" / "judge" / "texts.jsonl"


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000/v1",
        "file:///etc/passwd",
        "ftp://host/v1",
        "http://",
        "http://h:abc/v1",
        "http://h:99999",
        "http://a b",
        "http://h/a\nb",
        "http://[::1/v1",
        "http://h/\0",
        "https:/h",
    ],
)
def test_an_address_that_is_none_is_refused_before_anything_is_generated(url):
    (problem,) = HallucinationTaskConfig(path="x", judge="endpoint", url=url).problems(DEFAULTS)
    assert problem.startswith("url: ") and repr(url) in problem and "http://localhost:8000/v1" in problem


@pytest.mark.parametrize("url", ["http://localhost:8000/v1", "https://api.openai.com/v1", "http://[::1]:80/v1"])
def test_an_address_is_taken_and_a_key_that_no_header_can_send_is_not_shown(url, monkeypatch):
    config = HallucinationTaskConfig(path="x", judge="endpoint", url=url, api_key_env="SOME_KEY")
    assert config.problems(DEFAULTS) == []
    for key in ("secret\nvalue", "secr\u00e9t"):
        monkeypatch.setenv("SOME_KEY", key)
        (problem,) = config.problems(DEFAULTS)
        assert "SOME_KEY" in problem and "secr" not in problem
