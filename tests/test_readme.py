"""What the README shows is run or parsed here."""

import re
import shlex

import pytest

from difftune.cli import COMMANDS, main, parse
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


def commands_in(text):
    """Arguments of every call of difftune in the shell blocks of a text; continued lines joined."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.strip() for block in blocks for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
    called = [re.search(r"(?:^|[\s/])(?:difftune|cli\.py) (\w.*?)(?: &)?$", line) for line in lines if line[:1] != "#"]
    return [found[1].replace("$seed", "1") for found in called if found and "docker" not in found.string]


GUIDES = sorted((ROOT / "docs").rglob("*.md"))
GUIDE_LINES = [(path.name, line) for path in GUIDES for line in commands_in(path.read_text())]


def test_commands_are_found_in_the_guides():
    shell = "difftune fit a=1 \\\n  b=2 &\n.venv/bin/difftune plan\n# difftune no\ntorchrun x cli.py fit\n"
    text = f"```bash\n{shell}```\ndifftune no"
    assert commands_in(text) == ["fit a=1 b=2", "plan", "fit"]
    assert len(GUIDE_LINES) > 45 and len({name for name, _ in GUIDE_LINES}) >= 8


@pytest.mark.parametrize(("name", "line"), GUIDE_LINES, ids=[f"{name}-{n}" for n, (name, _) in enumerate(GUIDE_LINES)])
def test_the_commands_of_the_guides_are_understood(name, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    found = parse(words)
    assert found.command in COMMANDS
    ours = found.values.get("config", [""])[0].startswith("recipes/")
    # Not a recipe of the reader's own, nor the words that a general form is made of.
    if (ours and found.command in ("fit", "prepare", "plan")) or (found.command == "evaluate" and "KIND" not in line):
        assert main([*words, "--print-config"]) == 0


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
