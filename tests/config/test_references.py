import json

import yaml

from difftune.config import load_config
from difftune.config.text import to_yaml

RECIPE = """
model: {path: "${oc.env:DIFFTUNE_TEST_SECRET}/model"}
run_dir: runs/${model.path}
data: {train: [{path: synthetic:arithmetic}, {path: "${oc.env:DIFFTUNE_TEST_SECRET}"}]}
trainer: {max_steps: 5}
stages:
  - {name: one}
  - {name: two, model_note: 1}
""".replace(", model_note: 1", "")


def load(path, text=RECIPE, *overrides):
    path.write_text(text)
    return load_config(path, overrides)


def test_the_run_reads_the_value_and_its_recipe_keeps_the_reference(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFTUNE_TEST_SECRET", "s3cr3t")
    config = load(tmp_path / "a.yaml")
    assert (config.model.path, config.run_dir) == ("s3cr3t/model", "runs/s3cr3t/model")
    assert config.stages[1].data.train[1].path == "s3cr3t"
    text = to_yaml(config)
    assert "s3cr3t" not in text
    written = yaml.safe_load(text)
    assert written["model"]["path"] == "${oc.env:DIFFTUNE_TEST_SECRET}/model"
    assert written["stages"] == [{"name": "one"}, {"name": "two"}]
    assert load(tmp_path / "b.yaml", text) == config
    monkeypatch.setenv("DIFFTUNE_TEST_SECRET", "other")
    assert load(tmp_path / "b.yaml", text).model.path == "other/model"


def test_a_reference_of_the_command_line_stays_one_too_and_other_keys_are_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFTUNE_TEST_SECRET", "s3cr3t")
    config = load(
        tmp_path / "a.yaml",
        RECIPE,
        "tokenizer=${oc.env:DIFFTUNE_TEST_SECRET}",
        "logging.project=a-${trainer.max_steps}",
    )
    written = yaml.safe_load(to_yaml(config))
    assert written["tokenizer"] == "${oc.env:DIFFTUNE_TEST_SECRET}" and written["logging"]["project"] == "a-5"
    assert "s3cr3t" not in json.dumps(written)
