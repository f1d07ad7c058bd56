"""Which rooms and files of difftune may import which: one way, from the command line down to the operators."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "difftune"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Room or file -> what it may import from difftune: whole rooms, files of one, or what a room shows in its `__init__`.
ARROWS: dict[str, set[str]] = {
    "ops": set(),
    "environment": set(),
    "losses": {"ops"},
    "shard_files": set(),
    "fingerprints": set(),
    "interruption": set(),
    "user_text": set(),
    "small_files": set(),
    "user_errors": set(),
    "left_behind": {"user_errors"},
    "writing": {"user_errors"},
    "rendering": set(),
    "modeling": {"ops"},
    "checkpoints": {"fingerprints", "interruption", "modeling", "ops", "shard_files"},
    "data": {"rendering"},
    "training": {"losses", "modeling", "ops", "shard_files", "small_files", "writing"},
    "evaluation": {"modeling", "ops", "rendering", "writing"},
    "report": {"small_files"},
    "verification": {"checkpoints", "modeling", "ops", "training"},
    "run_folder": {"environment", "small_files", "training", "writing"},
    "result_folder": {"evaluation", "small_files", "writing"},
    "terminal": set(),
    "rank_errors": set(),
    "config": {"tasks", "user_text"},
    # A kind of task: its keys, and how it is built; the room below is imported when it is.
    "tasks": {"config.field", "data", "evaluation"},
    # What is made of a config. These, the plan and the commands are all that may see one.
    "builder.__init__": {"builder.model", "builder.stage"},
    "builder.scale": {"checkpoints", "config", "environment", "modeling", "training"},
    "builder.on_policy": {"data", "evaluation"},
    "builder.held_out": {"config", "data", "tasks"},
    "builder.distill": {"builder.on_policy", "checkpoints", "config", "data", "modeling", "training"},
    "builder.model": {"builder.scale", "checkpoints", "config", "data", "modeling", "rendering"},
    "builder.stage": {
        "builder.distill",
        "builder.scale",
        "checkpoints",
        "config",
        "data",
        "evaluation",
        "modeling",
        "run_folder",
        "training",
    },
    "plan": {
        "builder.__init__",
        "builder.distill",
        "builder.scale",
        "checkpoints",
        "config",
        "data",
        "environment",
        "evaluation",
        "losses",
        "modeling",
        "ops",
        "training",
    },
    "commands.__init__": set(),
    "commands.adapters": {"checkpoints", "data", "modeling", "terminal"},
    "commands.convert": {"checkpoints", "terminal"},
    "commands.doctor": {
        "checkpoints",
        "commands.doctor_ranks",
        "config",
        "environment",
        "ops",
        "plan",
        "terminal",
        "training",
        "verification",
    },
    "commands.doctor_ranks": set(),
    "commands.dry_run": {"data", "environment", "evaluation", "modeling", "training"},
    "commands.evaluate": {"evaluation", "report", "result_folder"},
    "commands.result_inputs": {"checkpoints", "config", "data", "evaluation", "fingerprints"},
    "commands.plan": {"config", "plan", "terminal", "user_text"},
    "commands.prepare": {
        "builder.__init__",
        "builder.distill",
        "builder.held_out",
        "commands.dry_run",
        "config",
        "data",
        "report",
        "run_folder",
        "training",
    },
    "commands.run": {
        "builder.__init__",
        "builder.scale",
        "checkpoints",
        "commands.dry_run",
        "commands.evaluate",
        "commands.prepare",
        "commands.result_inputs",
        "commands.stage_end",
        "config",
        "data",
        "evaluation",
        "left_behind",
        "modeling",
        "rendering",
        "report",
        "result_folder",
        "run_folder",
        "terminal",
        "training",
        "user_errors",
    },
    "commands.stage_end": {"config", "run_folder"},
    "commands.verify": {"checkpoints", "modeling", "terminal", "training", "verification"},
    "cli_commands": set(),
    "cli_arguments": {"cli_commands", "tasks", "user_text"},
    "cli": {
        "cli_arguments",
        "cli_commands",
        "commands.adapters",
        "commands.convert",
        "commands.doctor",
        "commands.plan",
        "commands.run",
        "commands.verify",
        "config",
        "interruption",
        "rank_errors",
        "report",
        "user_errors",
    },
    "__main__": {"cli"},
    "__init__": {"ops", "modeling", "checkpoints"},
}


def dotted(path: Path) -> str:
    """`data.chat` of `difftune/data/chat.py`, `data.__init__` of the room's own file."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


FILES = {dotted(path) for path in MODULES}


def imports(source: str) -> set[str]:
    """The files below `difftune` that a source imports, dotted, at any depth, those inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {file_of(name.removeprefix("difftune.")) for name in names if name.startswith("difftune.")} - {"__version__"}


def file_of(name: str) -> str:
    """The file that a dotted name is found in, which for what a room shows is its `__init__`."""
    parts = name.split(".")
    places = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((file for place in places for file in (place, f"{place}.__init__") if file in FILES), name)


def is_below(name: str, place: str) -> bool:
    """Whether a dotted name is a room or file, or something in it."""
    return f"{name}.".startswith(f"{place}.")


def test_the_import_reader_sees_every_form() -> None:
    source = (
        "import difftune.ops\nfrom difftune import cli\ndef f():\n    from difftune.data.chat import x\nimport torch\n"
        "from difftune.builder import build_model, scale\nfrom difftune import __version__, nothing\n"
    )
    found = {"ops.__init__", "cli", "data.chat", "builder.__init__", "builder.scale", "nothing"}
    assert imports(source) == found
    assert is_below("data.chat", "data") and is_below("data.chat", "data.chat") and is_below("cli", "cli")
    assert not is_below("data.chat", "data.ch") and not is_below("data.chat", "data.__init__")


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_arrows_point_one_way(path: Path) -> None:
    file = dotted(path)
    room = file.split(".")[0]
    place = file if file in ARROWS else room
    assert place in ARROWS, f"{file}: new here; say in ARROWS what it may import"
    # The files of a room see one another, unless ARROWS has them one by one.
    allowed = ARROWS[place] | {place}
    forbidden = {name for name in imports(path.read_text()) if not any(is_below(name, other) for other in allowed)}
    assert not forbidden, f"{file} imports {sorted(forbidden)}, which stand above or beside it"


def test_arrows_lead_from_and_to_what_is_there() -> None:
    there = FILES | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    named = {*ARROWS, *(other for allowed in ARROWS.values() for other in allowed)}
    assert not named - there, f"ARROWS names what is not there: {sorted(named - there)}"
