"""A command line taken apart: what it asks for, what of it is a recipe key, and what is wrong with it."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from difftune.cli_commands import COMMANDS, COMMON, Option
from difftune.user_text import TextError, expand_path, finite_number


@dataclass
class Invocation:
    """What a command line asks for."""

    command: str | None = None
    flags: set[str] = field(default_factory=set)
    values: dict[str, list[str]] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    operand: str | None = None
    more_operands: list[str] = field(default_factory=list)

    def single(self, name: str) -> str | None:
        """The value of an option that is given once at most."""
        return self.values[name][0] if name in self.values else None


class UsageError(ValueError):
    """The command line itself is wrong; nothing was loaded yet."""


def parse(arguments: Sequence[str]) -> Invocation:
    """Sort the arguments: the command, options and overrides may stand in any order.

    Raises:
        UsageError: If one is unknown, incomplete, or not of this command.
    """
    found = Invocation()
    options = {option.name: option for command in COMMANDS.values() for option in (*command.options, *COMMON)}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument in ("-h", "--help", "--version"):
            found.flags.add("help" if argument == "-h" else name)
        elif argument.startswith("--") and name in options:
            if options[name].metavar is None:
                if equals:
                    raise UsageError(f"--{name} takes no value, got {value!r}")
                found.flags.add(name)
                continue
            if not equals and not rest:
                raise UsageError(f"--{name} needs a value: --{name} {options[name].metavar}")
            found.values.setdefault(name, []).append(_value(options[name], value if equals else rest.pop(0)))
            if len(found.values[name]) > 1 and not options[name].repeatable:
                hint = "; a recipe can build on another with base:" if name == "config" else ""
                raise UsageError(f"--{name} is given twice{hint}")
        elif _is_operand(argument, found):
            _take_operand(argument, found)
        elif equals and (argument.startswith("--") or not argument.startswith("-")):
            found.overrides.append(argument)
        elif argument.startswith("-"):
            hint = f"; to set a recipe key, write {name}=VALUE" if "." in name else _nearest(name, options, "--")
            raise UsageError(f"unknown option {argument}{hint}")
        elif argument.endswith((".yaml", ".yml")):
            raise UsageError(f"a recipe goes after --config: --config {argument}")
        elif found.command is None:
            found.command = argument
        elif found.command in COMMANDS and COMMANDS[found.command].operand and found.operand is None:
            _take_operand(argument, found)
        else:
            raise UsageError(f"unexpected argument {argument!r}; to set a recipe key, write KEY=VALUE")
    _check(found)
    return found


def _is_operand(argument: str, found: Invocation) -> bool:
    """Whether an argument is what a command works on, whatever its name looks like: `runs/lr=1e-4`, `a.yaml`."""
    if found.command not in COMMANDS or argument.startswith("-"):
        return False
    command = COMMANDS[found.command]
    if command.operand is None or (found.operand is not None and not command.many):
        return False
    # KEY=VALUE is an operand only if it is there, or has the slash of a path before the sign.
    named_by_key = "=" in argument and "/" not in argument.partition("=")[0]
    return _is_there(argument) if named_by_key or command.reads_recipe else True


def _is_there(argument: str) -> bool:
    try:
        return Path(expand_path(argument)).exists()
    except (OSError, ValueError):
        return False


def _take_operand(argument: str, found: Invocation) -> None:
    assert found.command is not None
    try:
        path = expand_path(argument)
    except TextError as error:
        raise UsageError(f"{COMMANDS[found.command].operand} {error}") from error
    if found.operand is None:
        found.operand = path
    else:
        found.more_operands.append(path)


def _value(option: Option, value: str) -> str:
    """What an option was given; a path with `~` replaced."""
    if not option.is_path:
        return value
    try:
        return expand_path(value)
    except TextError as error:
        raise UsageError(f"--{option.name} {error}") from error


def number(name: str, text: str) -> float:
    """A finite number of the command line.

    Args:
        name: Of the option, for the error.
        text: What was given.

    Raises:
        UsageError: If it is none.
    """
    try:
        return finite_number(text)
    except TextError as error:
        raise UsageError(f"--{name} {error}") from error


def _check(found: Invocation) -> None:
    if found.command is None:
        if found.flags or not (found.values or found.overrides):
            return
        raise UsageError(f"which command? one of {', '.join(COMMANDS)}")
    if found.command not in COMMANDS:
        hint = _nearest(found.command, COMMANDS, "") or f"; one of {', '.join(COMMANDS)}"
        raise UsageError(f"unknown command '{found.command}'{hint}")
    command = COMMANDS[found.command]
    own = {option.name for option in (*command.options, *COMMON)} | {"version"}
    for name in [*found.flags, *found.values]:
        if name not in own:
            owners = [key for key, other in COMMANDS.items() if name in {o.name for o in other.options}]
            raise UsageError(f"--{name} is not an option of {found.command}, but of {', '.join(owners)}")
    if not command.reads_recipe and (found.overrides or "config" in found.values or "print-config" in found.flags):
        takes = f"{command.operand}{' ...' if command.many else ''} and " if command.operand else ""
        raise UsageError(
            f"{found.command} reads no recipe: it takes {takes}its own options; see difftune {found.command} --help"
        )


def option_overrides(found: Invocation) -> list[str]:
    """The options that are short for recipe keys, as overrides; what a user writes as key=value comes after them."""
    assert found.command is not None
    overrides = []
    if "model" in found.values:
        # A model brings its tokenizer; the recipe's is for a fresh one.
        overrides.append("tokenizer=null")
    tasks = _tasks(found)
    if tasks:
        overrides.append(f"evaluation.tasks={json.dumps(tasks)}")
    if found.command == "export" and "format" not in found.values:
        overrides.append("export={}")
    for option in COMMANDS[found.command].options:
        if option.key is not None and option.name in found.values:
            value = found.values[option.name][0]
            text = json.dumps(value) if option.is_text else value
            overrides += [f"{key}={text}" for key in _places(option.key, tasks)]
    return overrides


def _places(key: str, tasks: list[dict[str, Any]]) -> list[str]:
    """The keys that an option sets: one of every task goes to those of --task and --data whose kind has it."""
    from difftune.tasks import KINDS

    each = "evaluation.tasks.*."
    if not tasks or not key.startswith(each):
        return [key]
    name = key.removeprefix(each)
    having = [index for index, task in enumerate(tasks) if name in KINDS[task.get("kind", "math")].__dataclass_fields__]
    if not having:
        raise UsageError(f"--{name.replace('_', '-')}: no kind of these tasks has the key {name}")
    return [f"evaluation.tasks.{index}.{name}" for index in having]


def _tasks(found: Invocation) -> list[dict[str, Any]]:
    """The tasks of --data FILE and --task KIND or KIND:TEXT, as a recipe would have them."""
    from difftune.tasks import KINDS

    tasks: list[dict[str, Any]] = [{"path": path} for path in found.values.get("data", [])]
    for text in found.values.get("task", []):
        kind, colon, operand = text.partition(":")
        if kind not in KINDS:
            raise UsageError(
                f"--task {text}: unknown kind '{kind}'{_nearest(kind, KINDS, '')}; one of {', '.join(KINDS)}"
            )
        key = KINDS[kind].operand
        if colon and (key is None or not operand):
            raise UsageError(f"--task {text}: write --task {kind}" + (f":{key.upper()}" if key else ""))
        tasks.append({"kind": kind, **({key: operand} if key and operand else {})})
    return tasks


def task_overrides(found: Invocation) -> list[str]:
    """The user's KEY=VALUE; with --task KIND, `KIND.key=value` is a key of every task of that kind."""
    kinds = [task.get("kind") for task in _tasks(found)]
    overrides = []
    for text in found.overrides:
        kind, dot, rest = text.removeprefix("--").partition(".")
        places = [index for index, name in enumerate(kinds) if dot and name == kind and "=" in rest]
        overrides += [f"evaluation.tasks.{index}.{rest}" for index in places] or [text]
    return overrides


def _nearest(word: str, known: Any, dashes: str) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {dashes}{close[0]}?" if close else ""
