import json
import subprocess

import torch

from difftune import environment
from difftune.environment import describe_environment, total_memory_bytes


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
