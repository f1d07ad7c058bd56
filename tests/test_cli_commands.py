import pytest

from difftune.cli_commands import COMMANDS, COMMON, command_help, help_text


def test_help_shows_every_command_with_its_summary():
    shown = help_text()
    for name, command in COMMANDS.items():
        assert f"  {name}" in shown and command.summary in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_shows_every_option_and_an_example(name):
    shown = command_help(name)
    for option in (*COMMANDS[name].options, *COMMON):
        assert f"--{option.name}" in shown and option.help in shown
        assert option.key is None or f"[{option.key}]" in shown
    assert f"difftune {name} " in COMMANDS[name].examples and COMMANDS[name].examples in shown


def test_an_option_that_two_commands_share_means_the_same():
    meanings = {}
    for command in COMMANDS.values():
        for option in command.options:
            assert meanings.setdefault(option.name, option.metavar is None) == (option.metavar is None)
