"""The command line: what it accepts, what it says, and its exit codes."""

import logging
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import difftune
from difftune import cli, commands
from difftune.cli_commands import COMMANDS, help_text
from difftune.config import load_config
from tests.test_cli_arguments import refuse

ROOT = Path(__file__).resolve().parent.parent
RECIPE = """
tokenizer: digits
data: {train: [{path: synthetic:arithmetic}]}
trainer: {max_steps: 10}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for difftune.commands.run: keeps what it is called with, so that no torch is needed."""
    seen: dict[str, Any] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(config: Any, **arguments: Any) -> None:
            seen.update(command=name, config=config, arguments=arguments)

        return record

    fake = types.ModuleType("difftune.commands.run")
    for name in ("fit", "evaluate", "generate", "export"):
        setattr(fake, name, recorder(name))
    monkeypatch.setitem(sys.modules, "difftune.commands.run", fake)
    monkeypatch.setattr(commands, "run", fake, raising=False)
    return seen


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "--config", "RECIPE", "seed=3", "--optim.lr=0.5"],
        ["--config", "RECIPE", "fit", "--optim.lr=0.5", "seed=3"],
        ["seed=3", "--optim.lr=0.5", "fit", "--config=RECIPE"],
        ["--optim.lr=0.5", "--config", "RECIPE", "seed=3", "fit"],
    ],
)
def test_command_config_and_overrides_stand_in_any_order(
    calls: dict[str, Any], recipe: str, arguments: list[str]
) -> None:
    assert cli.main([argument.replace("RECIPE", recipe) for argument in arguments]) == 0
    assert calls["config"] == load_config(recipe, ["seed=3", "optim.lr=0.5"])
    assert calls["command"] == "fit" and calls["arguments"] == {"dry_run": False}


def test_dry_run_is_passed_on(calls: dict[str, Any], recipe: str) -> None:
    assert cli.main(["fit", "--config", recipe, "--dry-run"]) == 0
    assert calls["arguments"] == {"dry_run": True}


def test_the_exit_code_of_a_stopped_run_is_passed_on(
    calls: dict[str, Any], recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["difftune.commands.run"], "fit", lambda config, dry_run: 143)
    assert cli.main(["fit", "--config", recipe]) == 143


def test_evaluate_turns_its_options_into_config(calls: dict[str, Any]) -> None:
    arguments = ["--model", "m: 1", "--data", "a.jsonl", "--data=b.jsonl", "--limit", "5", "--max-new-tokens", "7"]
    assert cli.main(["evaluate", *arguments, "--batch-size=2", "--out", "results", "evaluation.top_p=0.5"]) == 0
    config = calls["config"]
    assert config.model.path == "m: 1" and config.tokenizer is None
    assert [(t.path, t.limit, t.max_new_tokens) for t in config.evaluation.tasks] == [
        ("a.jsonl", 5, 7),
        ("b.jsonl", 5, 7),
    ]
    assert (config.evaluation.batch_size, config.evaluation.top_p) == (2, 0.5)
    assert calls["arguments"] == {"out": Path("results"), "overwrite": False}


def test_tasks_are_named_by_kind_and_their_keys_are_set_by_it(calls: dict[str, Any]) -> None:
    tasks = ["--task", "math:a.jsonl", "--data", "z.jsonl", "--task=math:b.jsonl"]
    assert cli.main(["evaluate", "--model", "m", *tasks, "--limit", "9", "math.limit=4", "--math.split=x"]) == 0
    found = [(t.task_name(), t.limit, t.split) for t in calls["config"].evaluation.tasks]
    assert found == [("z", 9, None), ("a", 4, "x"), ("b", 4, "x")]


def test_an_option_of_some_kinds_is_set_where_there_is_such_a_key(
    calls: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "--model", "m", "--task", "needle", "--task", "math:a.jsonl", "--limit", "9"]) == 0
    assert calls["config"].evaluation.tasks[1].limit == 9
    message = refuse(capsys, "evaluate", "--model", "m", "--task", "needle", "--limit", "9")
    assert message == "--limit: no kind of these tasks has the key limit"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("mth", "--task mth: unknown kind 'mth'; did you mean math?; one of math"),
        ("math:", "--task math:: write --task math:PATH"),
        ("needle:", "--task needle:: write --task needle:HAYSTACK"),
    ],
)
def test_a_task_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], task: str, message: str) -> None:
    assert refuse(capsys, "evaluate", "--model", "m", "--task", task).startswith(message)


def test_evaluate_takes_the_tasks_of_a_recipe_and_the_tokenizer_of_the_model(
    calls: dict[str, Any], recipe: str
) -> None:
    Path(recipe).write_text(RECIPE + "model: {hidden_size: 64}\nevaluation: {tasks: [{path: a.jsonl, limit: 9}]}\n")
    assert cli.main(["evaluate", "--config", recipe, "--model", "m"]) == 0
    config = calls["config"]
    assert config.evaluation.tasks[0].limit == 9
    assert config.tokenizer is None and config.model.architecture() == {}


def test_generate_takes_prompts_and_standard_input(calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(read=lambda: "from a pipe"))
    assert cli.main(["generate", "--model", "m", "--prompt", "1+1=?", "--prompt", "-", "--temperature", "0.5"]) == 0
    asked = {"prompts": ["1+1=?", "from a pipe"], "system": None, "may_shorten": True}
    assert calls["arguments"] == asked
    assert calls["config"].evaluation.temperature == 0.5
    cli.main(["generate", "--model", "m", "--prompt", "1", "--system", "Be brief.", "--max-new-tokens", "9"])
    assert calls["arguments"] == {"prompts": ["1"], "system": "Be brief.", "may_shorten": False}


def test_export_names_a_format_and_a_folder(calls: dict[str, Any]) -> None:
    assert cli.main(["export", "--model", "m", "--format", "difftune", "--out", "o"]) == 0
    assert (calls["config"].export.format, calls["arguments"]) == ("difftune", {"out": Path("o"), "overwrite": False})
    assert cli.main(["export", "m", "--out", "o", "--overwrite"]) == 0
    assert calls["config"].model.path == "m" and calls["arguments"]["overwrite"]
    assert calls["config"].export.format == "auto"


def test_print_config_shows_what_loads_again_and_runs_nothing(
    calls: dict[str, Any], recipe: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["fit", "--config", recipe, "--print-config", "seed=7"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(recipe, ["seed=7"]) and not calls


def test_a_misspelt_key_is_one_message_with_file_and_line(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(recipe).write_text(RECIPE + "optim:\n  lrr: 1\n")
    message = refuse(capsys, "fit", "--config", recipe)
    assert message == f"1 problem in {recipe}:\n  {recipe}:6: unknown key 'optim.lrr'; did you mean 'optim.lr'?"


def test_a_wrong_option_names_its_key(capsys: pytest.CaptureFixture[str]) -> None:
    message = refuse(capsys, "generate", "--model", "m", "--prompt", "x", "--temperature", "hot")
    assert "command line (evaluation.temperature=...): evaluation.temperature must be a number, got 'hot'" in message
    assert "model.path: export needs a model; give --model DIR" in refuse(capsys, "export", "--out", "o", "seed=1")


def raising(error: BaseException) -> Callable[..., None]:
    def fit(config: Any, dry_run: bool) -> None:
        raise error

    return fit


@pytest.mark.parametrize(
    ("error", "code", "traceback"),
    [
        (FileNotFoundError("no such file: a.jsonl"), 2, False),
        (PermissionError("not yours"), 2, False),
        (ValueError("from a library"), 1, True),
        (RuntimeError("out of memory"), 1, True),
        (KeyboardInterrupt(), 130, False),
    ],
)
def test_failures_of_a_run_have_their_exit_codes(
    calls: dict[str, Any],
    recipe: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    traceback: bool,
) -> None:
    monkeypatch.setattr(sys.modules["difftune.commands.run"], "fit", raising(error))
    assert cli.main(["fit", "--config", recipe]) == code
    assert ("Traceback" in capsys.readouterr().err) == traceback


def test_a_value_that_our_code_refuses_is_the_users_error(
    calls: dict[str, Any], recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fit(config: Any, dry_run: bool) -> None:
        load_config(None, ["seed=-1"])

    monkeypatch.setattr(sys.modules["difftune.commands.run"], "fit", fit)
    assert "seed must be at least 0, got -1" in refuse(capsys, "fit", "--config", recipe)


def test_debug_shows_the_traceback(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--debug", "fit", "--config", recipe, "seed=x"]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" in printed and printed.rstrip().endswith("seed must be an integer, got 'x'")


def test_options_name_keys_that_exist() -> None:
    from difftune.config.text import documented_keys

    known = {key.path for key in documented_keys()}
    keys = [option.key for command in COMMANDS.values() for option in command.options if option.key]
    assert keys and {key.replace(".*", "[]") for key in keys} <= known


def test_help_version_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"difftune {difftune.__version__}\n"
    assert cli.main([]) == 2
    assert "usage: difftune COMMAND" in capsys.readouterr().err


def test_list_keys_shows_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "--list-keys"]) == 0
    assert "trainer.max_steps (an integer, default -1)" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["fit", "--list-keys"]])
def test_help_loads_no_torch(arguments: list[str]) -> None:
    program = "import sys\nfrom difftune.cli import main\ncode = main(sys.argv[1:])\n"
    program += "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)\nsys.exit(code)"
    subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("words", [["cli.py"], ["-m", "difftune"]], ids=["file", "module"])
def test_what_a_launcher_starts_is_the_same_command_line(words: list[str]) -> None:
    done = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.rstrip("\n") == help_text()


def test_advice_of_a_package_that_we_do_not_follow_is_not_shown() -> None:
    assert cli.main(["--version"]) == 0
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


def test_no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "WANDB_ERROR_REPORTING", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    cli.main(["--version"])
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1" and os.environ["DO_NOT_TRACK"] == "1"
    monkeypatch.setenv("DO_NOT_TRACK", "0")
    cli.main(["--version"])
    assert os.environ["DO_NOT_TRACK"] == "0", "a user's own setting stays"


def test_a_ctrl_c_that_became_another_error_is_a_ctrl_c(
    calls: dict[str, Any], recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fit(config: Any, dry_run: bool) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("model.safetensors is damaged or incomplete") from None

    monkeypatch.setattr(sys.modules["difftune.commands.run"], "fit", fit)
    assert cli.main(["fit", "--config", recipe]) == 130
    assert capsys.readouterr().err == "difftune: stopped by the user\n"
