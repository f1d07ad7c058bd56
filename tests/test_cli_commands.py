"""The table of commands, and the help made from it."""

import pytest

from difftune.cli_commands import COMMANDS, COMMON, command_help, help_text


def test_every_command_is_in_the_help() -> None:
    lines = help_text().splitlines()
    assert all(any(line.split()[:1] == [name] and c.summary in line for line in lines) for name, c in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_options_of_a_command_have_names_of_their_own(name: str) -> None:
    names = [option.name for option in (*COMMANDS[name].options, *COMMON)]
    assert len(set(names)) == len(names)
    assert all(option.metavar or not (option.is_text or option.key) for option in COMMANDS[name].options)


def test_only_commands_with_a_recipe_offer_its_keys() -> None:
    assert "[KEY=VALUE ...]" in command_help("fit") and "--config FILE" in command_help("fit")
    convert = command_help("convert")
    assert convert.startswith("usage: difftune convert SOURCE [options]")
    assert "--config" not in convert and "KEY=VALUE" not in convert and "--debug" in convert
