import json
import re
import subprocess

import pytest
import torch

from difftune import environment
from difftune.environment import (
    TESTED,
    describe_environment,
    mask_secrets,
    total_memory_bytes,
    untested_versions,
    version_of,
)
from tests.conftest import ROOT


def test_versions_hardware_and_commit_are_described_in_plain_json():
    found = json.loads(json.dumps(describe_environment()))
    assert found["packages"]["lightning"] and torch.__version__.startswith(found["packages"]["torch"].split("+")[0])
    assert found["packages"]["flash-attn"] is None or isinstance(found["packages"]["flash-attn"], str)
    assert found["memory_gib"] > 0.5 and found["cpu_count"] >= 1
    assert found["git"] is None or len(found["git"]["commit"]) == 40


def test_a_git_that_does_not_answer_ends_nothing(monkeypatch):
    def silent(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(environment.subprocess, "run", silent)
    assert environment.describe_environment()["git"] is None


def test_memory_is_that_of_the_machine():
    assert 2**29 < total_memory_bytes() < 2**50


def test_the_tested_versions_are_those_of_the_constraints():
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    assert {name: pins[name] for name in TESTED} == TESTED


@pytest.mark.parametrize(
    ("installed", "is_newer"),
    [
        ("5.23.0", False),
        ("5.23", False),
        ("5.9.0", False),
        ("5.23.0+local", False),
        ("5.23.1", True),
        ("5.100.0", True),
    ],
)
def test_newer_than_tested_is_a_matter_of_releases(monkeypatch, installed, is_newer):
    monkeypatch.setitem(environment.TESTED, "transformers", "5.23.0")
    there = {**TESTED, "transformers": installed}
    monkeypatch.setattr(environment, "version_of", there.get)
    assert untested_versions() == ({"transformers": (installed, "5.23.0")} if is_newer else {})


def test_a_package_that_is_not_there_has_no_version_and_is_not_newer(monkeypatch):
    assert version_of("no-such-package-at-all") is None
    monkeypatch.setattr(environment, "version_of", lambda name: None)
    assert untested_versions() == {}


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("judge.api_key=sk-1", "judge.api_key=***"),
        ("API_KEYS=a", "API_KEYS=***"),
        ("HF_TOKEN=hf_1", "HF_TOKEN=***"),
        ("client-secret=a:b", "client-secret=***"),
        ("db.password='a b'", "db.password=***"),
        (
            "evaluation.tasks=[{kind: x, api_key: sk-1, limit: 3}]",
            "evaluation.tasks=[{kind: x, api_key: ***, limit: 3}]",
        ),
        ('a={"token": "x y"}', 'a={"token": ***}'),
        ("--api-key=sk-1", "--api-key=***"),
        ("url=https://me:pw@host/v1", "url=https://***@host/v1"),
        ("judge.api_key=${oc.env:KEY}", "judge.api_key=${oc.env:KEY}"),
        ("evaluation.max_new_tokens=64", "evaluation.max_new_tokens=64"),
        ("model.num_key_value_heads=4", "model.num_key_value_heads=4"),
        ("tokenizer=digits", "tokenizer=digits"),
    ],
)
def test_secrets_of_a_command_line_are_masked(word, shown):
    assert mask_secrets(["difftune", word]) == ["difftune", shown]


def test_the_value_of_a_secret_option_is_masked(monkeypatch):
    monkeypatch.setattr("sys.argv", ["difftune", "--hf-token", "hf_1", "--debug"])
    assert describe_environment()["command"] == ["difftune", "--hf-token", "***", "--debug"]
