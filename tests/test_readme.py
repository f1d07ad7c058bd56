"""What the README shows is run or parsed here."""

import re
import shlex

import pytest

from difftune.cli import COMMANDS, parse
from difftune.config import load_config
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMAND_LINES = sorted(
    {
        line.split("difftune ", 1)[1] if "cli.py " not in line else line.split("cli.py ", 1)[1]
        for line in [
            *re.findall(r"^\.venv/bin/(difftune .*)$", README, flags=re.MULTILINE),
            *re.findall(r"`((?:difftune|torchrun) [^`]*)`", README),
        ]
    }
)


def test_the_readme_shows_commands_and_python():
    assert len(COMMAND_LINES) >= 10 and [kind for kind, _ in BLOCKS].count("python") >= 1


@pytest.mark.parametrize("code", [code for kind, code in BLOCKS if kind == "python"])
def test_the_python_examples_run(code):
    assert "\nassert " in code, "an example shows what it comes to"
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_the_commands_are_understood(line):
    found = parse(shlex.split(line))
    assert found.command in COMMANDS or found.flags
    if found.command == "fit" and "config" in found.values:
        path = ROOT / found.values["config"][0]
        assert load_config(path, found.overrides, command="fit").stages is not None


def test_the_checkpoint_that_the_readme_exports_is_the_quickstarts_last():
    steps = load_config(ROOT / "recipes" / "quickstart.yaml").stages[-1].trainer.max_steps
    assert f"checkpoints/traces/step-{steps:08d} " in README


def anchors_of(text):
    """What a link can name in a Markdown file, as GitHub makes it of the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda path: path.name
)
def test_links_between_documents_lead_somewhere(path):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", path.read_text())
    for target, anchor in links:
        found = path.parent / target if target else path
        assert found.exists(), f"{path.name} links to {target}"
        assert not anchor or anchor in anchors_of(found.read_text()), f"{path.name} links to {target}#{anchor}"
