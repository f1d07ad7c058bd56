from pathlib import Path

import pytest

from difftune import cli
from difftune.commands import convert as command
from difftune.commands.convert import convert


def test_convert_refuses_unknown_values_before_it_reads(tmp_path):
    with pytest.raises(ValueError, match="dtype 'int8' is unknown: choose one of float32, bfloat16, float16"):
        convert("absent", to="diff_v2", out=tmp_path / "out", dtype="int8")
    with pytest.raises(ValueError, match="must have more than 0 GB, got -1"):
        convert("absent", to="diff_v2", out=tmp_path / "out", max_shard_gb=-1)
    with pytest.raises(ValueError, match="absent does not exist"):
        convert("absent", to="diff_v2", out=tmp_path / "out")


def test_convert_takes_a_source_and_its_own_options(monkeypatch):
    calls = {}
    monkeypatch.setattr(
        command, "convert", lambda source, **arguments: calls.update(source=source, arguments=arguments)
    )
    options = ["--to", "diff_v1", "--out=o", "--text", "t.txt", "--subln", "none", "--lambda-init", "0.1"]
    options += ["--lambda-warmup-steps", "200"]
    assert (
        cli.main(["convert", "owner/name", *options, "--dtype", "bfloat16", "--max-shard-gb", "2", "--overwrite"]) == 0
    )
    assert calls["source"] == "owner/name"
    assert calls["arguments"] == {
        "to": "diff_v1",
        "out": Path("o"),
        "text": Path("t.txt"),
        "subln": "none",
        "lambda_init": 0.1,
        "lambda_warmup_steps": 200,
        "dtype": "bfloat16",
        "max_shard_gb": 2.0,
        "overwrite": True,
    }
    assert cli.main(["convert", "s", "--to", "llama", "--out", "o"]) == 0
    assert calls["arguments"]["dtype"] is None and not calls["arguments"]["overwrite"]
