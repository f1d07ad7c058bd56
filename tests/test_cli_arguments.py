"""What a command line may say, and the one message of one that is wrong."""

import pytest

from difftune import cli
from difftune.cli_arguments import parse
from difftune.cli_commands import COMMANDS
from tests.conftest import ROOT

EVERY = "fit, plan, doctor, verify, prepare, evaluate, generate, export, merge, convert, compare, report"


def refuse(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one message of a command line that is wrong."""
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    assert printed.err.startswith("difftune: error: ")
    return printed.err.removeprefix("difftune: error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fti"], "unknown command 'fti'; did you mean fit?"),
        (["xyzzy"], f"unknown command 'xyzzy'; one of {EVERY}"),
        (["--model", "m"], f"which command? one of {EVERY}"),
        (["fit"], "fit needs a recipe, such as --config recipes/quickstart.yaml, or key=value settings"),
        (["fit", "a.yaml"], "a recipe goes after --config: --config a.yaml"),
        (["fit", "--config"], "--config needs a value: --config FILE"),
        (
            ["fit", "--config", "a", "--config", "b"],
            "--config is given twice; a recipe can build on another with base:",
        ),
        (["fit", "--dry-run=1"], "--dry-run takes no value, got '1'"),
        (["fit", "--dryrun"], "unknown option --dryrun; did you mean --dry-run?"),
        (["fit", "-x"], "unknown option -x"),
        (
            ["fit", "--trainer.max_steps", "3"],
            "unknown option --trainer.max_steps; to set a recipe key, write trainer.max_steps=VALUE",
        ),
        (["fit", "now"], "unexpected argument 'now'; to set a recipe key, write KEY=VALUE"),
        (["fit", "--prompt", "x"], "--prompt is not an option of fit, but of generate"),
        (
            ["evaluate", "--model", "m"],
            "evaluate needs tasks: --data FILE, --task KIND, or --config with a recipe that has evaluation.tasks",
        ),
        (["generate", "--model", "m"], "generate needs --prompt; see difftune generate --help"),
        (["export", "--model", "m"], "export needs --out; see difftune export --help"),
        (["fit", "--config", "nowhere.yaml"], "recipe not found: nowhere.yaml"),
    ],
)
def test_a_wrong_command_line_is_one_message(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert refuse(capsys, *arguments) == message


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_every_option_and_examples_that_parse(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import shlex

    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    for option in COMMANDS[command].options:
        assert f"--{option.name}" in text and option.help in text
    assert text.startswith(f"usage: difftune {command} ") and "None" not in text.splitlines()[0]
    examples = [line.split("   ")[0].strip() for line in COMMANDS[command].examples.splitlines() if line.strip()]
    assert examples
    for example in examples:
        program, *arguments = shlex.split(example)
        assert program == "difftune" and parse(arguments).command == command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "--to", "diff_v2", "--out", "o"], "convert needs SOURCE; see difftune convert --help"),
        (["convert", "s", "--out", "o"], "convert needs --to; see difftune convert --help"),
        (["convert", "s", "--to", "diff_v2"], "convert needs --out; see difftune convert --help"),
        (["convert", "s", "t"], "unexpected argument 't'; to set a recipe key, write KEY=VALUE"),
        (
            ["convert", "s", "--to", "diff_v2", "--out", "o", "optim.lr=1"],
            "convert reads no recipe: it takes SOURCE and its own options; see difftune convert --help",
        ),
        (
            ["convert", "s", "--to", "diff_v1", "--out", "o", "--lambda-init", "small"],
            "--lambda-init must be a number, got 'small'",
        ),
        (
            ["convert", "s", "--to", "diff_v1", "--out", "o", "--lambda-warmup-steps", "1.5"],
            "--lambda-warmup-steps must be a whole number of optimiser steps, got '1.5'",
        ),
        (["fit", "--to", "diff_v2"], "--to is not an option of fit, but of convert"),
        (
            ["merge", "a", "--out", "o", "seed=1"],
            "merge reads no recipe: it takes ADAPTER and its own options; see difftune merge --help",
        ),
        (["merge", "a"], "merge needs --out; see difftune merge --help"),
        (["export", "a", "--model", "b", "--out", "o"], "export has two sources: a and --model b"),
        (
            ["export", "m", "--base", "b", "--out", "o"],
            "--base is for adapters, and m is not one (no adapter_config.json)",
        ),
    ],
)
def test_a_wrong_convert_is_one_message(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert refuse(capsys, *arguments) == message


ENOUGH = ("tokenizer=digits", "data.train=[{path: a.jsonl}]")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare"], "prepare needs a recipe, such as --config recipes/quickstart.yaml, or key=value settings"),
        (
            ["prepare", "--config", str(ROOT / "recipes" / "quickstart.yaml"), "--workers", "0"],
            "--workers must be a number from 1 on, got '0'",
        ),
        (["fit", "--teacher"], "--teacher is not an option of fit, but of prepare"),
    ],
)
def test_a_wrong_prepare_is_one_message(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert refuse(capsys, *arguments) == message
