"""The command line: commands, overrides, exit codes. Imports no torch until a command needs it.

Exit codes: 0 done; 1 the run failed; 2 the user's input was wrong, told in one message; 128 + n stopped by signal n.
"""

import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from difftune import __version__
from difftune.cli_arguments import Invocation, UsageError, number, option_overrides, parse, task_overrides
from difftune.cli_commands import COMMANDS, command_help, help_text
from difftune.interruption import raising
from difftune.rank_errors import is_told_by_first
from difftune.user_errors import is_user_error, message_of, naming


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of the process, and return its exit code."""
    _disable_telemetry()
    _write_what_the_terminal_can()
    # It advises another package for a fast path that our 4-bit layers turn off, since that path loses gradients.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        with raising(signal.SIGINT, KeyboardInterrupt):
            return _dispatch(parse(arguments))
    except KeyboardInterrupt:
        print("difftune: stopped by the user", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away, as `head` does; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        code = 2 if is_user_error(error) else 1
        if is_told_by_first(error):
            return code
        if debug or code == 1:
            traceback.print_exc()
        if code == 2:
            print(f"difftune: error: {message_of(error)}", file=sys.stderr)
        return code


def _dispatch(found: Invocation) -> int:
    if "version" in found.flags:
        print(f"difftune {__version__}")
        return 0
    if found.command is None:
        print(help_text(), file=sys.stdout if found.flags else sys.stderr)
        return 0 if found.flags else 2
    if "help" in found.flags:
        print(command_help(found.command))
        return 0
    if "list-keys" in found.flags:
        from difftune.config.text import key_list

        print(key_list())
        return 0
    return _run(found)


def _run(found: Invocation) -> int:
    from difftune.config import load_config

    command = found.command
    assert command is not None
    if command == "convert":
        return _convert(found)
    if command == "verify":
        from difftune.commands.verify import verify

        return verify(found.single("model"), dtype=found.single("dtype"), device=found.single("device"))
    if COMMANDS[command].many:
        return _look_at_runs(found)
    if command == "merge" or (command == "export" and _is_of_adapter(found)):
        return _write_adapter(found)
    config_file = found.single("config")
    if command in ("fit", "prepare", "plan") and config_file is None and not found.overrides:
        raise UsageError(f"{command} needs a recipe, such as --config recipes/quickstart.yaml, or key=value settings")
    for name in {"evaluate": (), "generate": ("prompt",), "export": ("out",)}.get(command, ()):
        if name not in found.values and "print-config" not in found.flags:
            raise UsageError(f"{command} needs --{name}; see difftune {command} --help")
    if command == "evaluate" and config_file is None and not {"data", "task"} & found.values.keys():
        raise UsageError(
            "evaluate needs tasks: --data FILE, --task KIND, or --config with a recipe that has evaluation.tasks"
        )

    if command == "doctor" and "print-config" not in found.flags:
        from difftune.commands.doctor import diagnose

        return diagnose(config_file, found.overrides)

    config = load_config(config_file, option_overrides(found) + task_overrides(found), command=command)
    if "print-config" in found.flags:
        from difftune.config.text import to_yaml

        print(to_yaml(config), end="")
        return 0

    if command == "plan":
        from difftune.commands.plan import plan

        return plan(config, found.values, as_json="json" in found.flags)

    from difftune.commands import run

    out = found.single("out")
    if command == "fit":
        return run.fit(config, dry_run="dry-run" in found.flags) or 0
    if command == "prepare":
        workers = found.single("workers")
        if workers is not None and not (workers.isascii() and workers.isdigit() and workers.strip("0")):
            raise UsageError(f"--workers must be a number from 1 on, got {workers[:40]!r}")
        if workers is not None and len(workers) > 4:
            raise UsageError(f"--workers must be at most 9999, got {workers[:40]}")
        run.prepare(
            config,
            workers=int(workers) if workers else os.cpu_count() or 1,
            teacher="teacher" in found.flags,
            check="check" in found.flags,
        )
    elif command == "evaluate":
        run.evaluate(config, out=Path(out) if out else None, overwrite="overwrite" in found.flags)
    elif command == "generate":
        prompts = [sys.stdin.read() if text == "-" else text for text in found.values["prompt"]]
        if not all(prompt.strip() for prompt in prompts):
            raise UsageError("--prompt is empty: give a text, or - and the text on standard input")
        is_set = "max-new-tokens" in found.values or any("max_new_tokens" in text for text in found.overrides)
        run.generate(config, prompts=prompts, system=found.single("system"), may_shorten=not is_set)
    else:
        assert out is not None
        run.export(config, out=Path(out), overwrite="overwrite" in found.flags)
    return 0


def _is_of_adapter(found: Invocation) -> bool:
    """Whether an export is that of an adapter; also gives --model what SOURCE says."""
    if found.operand is not None:
        if "model" in found.values:
            raise UsageError(f"export has two sources: {found.operand} and --model {found.single('model')}")
        found.values["model"] = [found.operand]
    source, name = found.single("model"), found.single("format")
    if source is not None and (Path(source).expanduser() / "adapter_config.json").is_file():
        return True
    if name in ("peft", "merged", "diffllama-peft"):
        if source is not None and (Path(source).expanduser() / "config.json").is_file():
            raise UsageError(f"{source} is a model, and {name} is a format of adapters: see difftune export --help")
        return True
    for option in ("base", "base-diffllama"):
        if option in found.values:
            raise UsageError(f"--{option} is for adapters, and {source} is not one (no adapter_config.json)")
    return False


def _write_adapter(found: Invocation) -> int:
    """Merge or export an adapter, which reads no recipe."""
    source, out = found.single("model") or found.operand, found.single("out")
    if found.overrides or "config" in found.values or "print-config" in found.flags:
        raise UsageError(f"{found.command} reads no recipe for an adapter: see difftune {found.command} --help")
    for name, given in (("ADAPTER" if found.command == "merge" else "SOURCE", source), ("--out", out)):
        if given is None:
            raise UsageError(f"{found.command} needs {name}; see difftune {found.command} --help")
    assert source is not None and out is not None

    from difftune.commands import adapters

    names = ("base", "dtype", "format") + (("onto",) if found.command == "merge" else ("base-diffllama",))
    options = {name.replace("-", "_"): found.values[name][0] for name in names if name in found.values}
    write = adapters.merge if found.command == "merge" else adapters.export_adapter
    write(source, out=Path(out), overwrite="overwrite" in found.flags, **options)
    return 0


def _convert(found: Invocation) -> int:
    """From one kind or layout to another, which reads no recipe."""
    for name, given in (("SOURCE", found.operand), ("--to", found.single("to")), ("--out", found.single("out"))):
        if given is None:
            raise UsageError(f"convert needs {name}; see difftune convert --help")
    numbers: dict[str, float] = {}
    for name in ("lambda-init", "max-shard-gb"):
        value = found.single(name)
        if value is not None:
            numbers[name] = number(name, value)
            if name == "max-shard-gb" and numbers[name] <= 0:
                raise UsageError(f"--{name} must be greater than 0, got {value}")
    steps = found.single("lambda-warmup-steps")
    if steps is not None and not (steps.isascii() and steps.isdigit()):
        raise UsageError(f"--lambda-warmup-steps must be a whole number of optimiser steps, got {steps[:40]!r}")
    if steps is not None and len(steps) > 12:
        raise UsageError(f"--lambda-warmup-steps must have at most 12 digits, got {len(steps)}")

    from difftune.commands.convert import convert

    assert found.operand is not None
    convert(
        found.operand,
        to=found.values["to"][0],
        out=Path(found.values["out"][0]),
        text=Path(found.values["text"][0]) if "text" in found.values else None,
        subln=found.single("subln"),
        lambda_init=numbers.get("lambda-init"),
        lambda_warmup_steps=None if steps is None else int(steps),
        dtype=found.single("dtype"),
        max_shard_gb=numbers.get("max-shard-gb"),
        overwrite="overwrite" in found.flags,
    )
    return 0


def _look_at_runs(found: Invocation) -> int:
    """Compare and report: they read run folders, and need neither a recipe nor torch."""
    if found.operand is None:
        raise UsageError(f"{found.command} needs RUN, the folder of a run; see difftune {found.command} --help")
    runs = [found.operand, *found.more_operands]
    if found.command == "report":
        from difftune.report.page import write_report

        out = Path(found.single("out") or "report.html")
        with naming(f"--out {out}"):
            print(write_report(runs, out))
        return 0
    from rich.console import Console

    from difftune.report.compare import compare_runs, comparison_table

    Console(markup=False).print(comparison_table(compare_runs(runs, metrics=found.values.get("metric", []))))
    return 0


def _write_what_the_terminal_can() -> None:
    """A terminal that knows few characters gets the others escaped; without this, an answer would end the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not (stream.encoding or "").lower().startswith("utf"):
            stream.reconfigure(errors="backslashreplace")


def _disable_telemetry() -> None:
    """Ask the libraries below not to report usage; a user who wants it sets the variable."""
    for name, value in (
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("DO_NOT_TRACK", "1"),
        ("WANDB_ERROR_REPORTING", "false"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ):
        os.environ.setdefault(name, value)
