"""The shape of the project: file lengths, the README's tree, mirrored tests, docstrings, recipe headers."""

import ast
import os
import re
import sys
from pathlib import Path

import pytest
import yaml

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "difftune"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted([ROOT / "cli.py", *MODULES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_file_is_longer_than_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_the_tree_in_the_readme_is_the_tree() -> None:
    shown = tree_paths((ROOT / "README.md").read_text())
    missing = [path for path in shown if not (ROOT / path).exists()]
    assert not missing, f"README.md shows what is not there: {missing}"
    there = {relative(path) for path in MODULES if path.name != "__init__.py" or path.parent == PACKAGE}
    unshown = sorted(there - shown)
    assert not unshown, f"README.md does not show {unshown}"


def tree_paths(readme: str) -> set[str]:
    """Paths in the code block that draws the tree: the names before two spaces, folders with a slash."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE)
    block = next((b for b in blocks if re.search(r"^difftune/", b, flags=re.MULTILINE)), None)
    assert block is not None, "README.md has no code block with the tree (a line that begins with difftune/)"
    paths: set[str] = set()
    folders: list[tuple[int, str]] = []
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        while folders and folders[-1][0] >= indent:
            folders.pop()
        prefix = "".join(name for _, name in folders)
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            if name.endswith("/"):
                folders.append((indent, name))
                paths.add((prefix + name).rstrip("/"))
            elif re.fullmatch(r"[\w.-]+\.\w+|Makefile|LICENSE|Dockerfile|\.ci/run", name):
                paths.add(prefix + name)
            else:
                break
    return paths


def test_the_tree_reader_reads_names_and_not_remarks() -> None:
    drawn = """
```bash
make test
```
```
README.md Makefile   the map
difftune/
  cli.py        commands, exit codes
  ops/          torch.nn only
    sdpa.py flash.py
```"""
    assert tree_paths(drawn) == {
        "Makefile",
        "README.md",
        "difftune",
        "difftune/cli.py",
        "difftune/ops",
        "difftune/ops/sdpa.py",
        "difftune/ops/flash.py",
    }


def has_code(path: Path) -> bool:
    """Whether there is something to test: a function, or a class with methods."""
    return any(isinstance(node, ast.FunctionDef) for node in ast.walk(ast.parse(path.read_text())))


@pytest.mark.parametrize("path", [path for path in MODULES if path.name != "__init__.py"], ids=relative)
def test_every_module_has_its_test_file(path: Path) -> None:
    inside = path.relative_to(PACKAGE)
    mirror = ROOT / "tests" / inside.parent / f"test_{inside.name}"
    assert mirror.is_file() or not has_code(path), f"{relative(path)} has no {relative(mirror)}"


def public_definitions(tree: ast.Module) -> list[tuple[str, ast.AST]]:
    """Public functions and classes of a module, and the public methods of those classes."""
    found: list[tuple[str, ast.AST]] = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            found.append((node.name, node))
            if isinstance(node, ast.ClassDef):
                methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
                found += [(f"{node.name}.{m.name}", m) for m in methods if not m.name.startswith("_")]
    return found


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    silent = [name for name, node in public_definitions(tree) if not ast.get_docstring(node)]  # type: ignore[arg-type]
    assert ast.get_docstring(tree) or not tree.body, f"{relative(path)} has no module docstring"
    # An override whose base class documents it says nothing new by repeating it.
    assert not silent, f"{relative(path)}: no docstring for {silent}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").glob("*.py")), ids=relative)
def test_operators_say_what_goes_in_and_what_comes_out(path: Path) -> None:
    tree = ast.parse(path.read_text())
    exported = {name for name, _ in public_definitions(tree)} & {
        "diff_attention",
        "softmax_attention",
        "linear_cross_entropy",
    }
    for name, node in public_definitions(tree):
        if name in exported:
            text = ast.get_docstring(node) or ""  # type: ignore[arg-type]
            lacking = [section for section in ("Args:", "Returns:", "Raises:") if section not in text]
            assert not lacking, f"{name}: the docstring lacks {lacking}"


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_a_recipe_begins_with_purpose_hardware_command_and_expectation(path: Path) -> None:
    lines = path.read_text().splitlines()
    header = "\n".join(line for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    for word in ("Purpose:", "Hardware:", "Command:", "Expect:"):
        assert re.search(rf"{word}\s*\S", header), f"{relative(path)}: the header has no {word}"
    assert re.search(r"\b(seconds?|minutes?|hours?|days?)\b", header), f"{relative(path)}: the header tells no time"
    assert f"--config {relative(path)}" in header, "the command in the header does not name the recipe"


TEXT_SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".sh", ".cfg", ""}
SKIPPED = {".git", "runs", "build", "dist", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}


def text_files() -> list[Path]:
    files: list[Path] = []
    for folder, folders, names in os.walk(ROOT):
        # Not even looked into: there other processes make and remove what they like.
        folders[:] = [name for name in folders if not (name in SKIPPED or name.startswith(".venv"))]
        folders[:] = [name for name in folders if not name.endswith(".egg-info")]
        files += [Path(folder, name) for name in names if Path(name).suffix in TEXT_SUFFIXES and name not in SKIPPED]
    return files


# Put together here, so that this file does not find itself.
PRIVATE = re.compile(r"(?<![\w.])/(?:" + "|".join(("home", "root", "work", "Users", "mnt")) + r")/[a-zA-Z]")
UNFINISHED = re.compile(
    r"\b(?:" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK")) + r")\b|NotImplemented" + "Error"
)


def test_no_file_knows_a_private_path_or_leaves_something_undone() -> None:
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if PRIVATE.search(line) or (path.suffix == ".py" and UNFINISHED.search(line)):
                found.append(f"{relative(path)}:{number}: {line.strip()[:80]}")
    assert not found, "\n".join(found)


def test_the_searches_find_what_they_look_for() -> None:
    assert PRIVATE.search("cp /" + "home/ann/x .") and PRIVATE.search('"/' + 'work/data"')
    assert not PRIVATE.search("https://example.org/home/x") and not PRIVATE.search("my/home/x")
    assert UNFINISHED.search("# TO" + "DO: later") and not UNFINISHED.search("method")


def third_party_imports() -> set[str]:
    names: set[str] = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
    return names - set(sys.stdlib_module_names) - {"difftune"}


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    as_module = {"pyyaml": "yaml", "huggingface_hub": "huggingface_hub"}

    def modules(requirements: list[str]) -> set[str]:
        names = (re.split(r"[^\w-]", text)[0].replace("-", "_").lower() for text in requirements)
        return {as_module.get(name, name) for name in names}

    needed = modules(project["dependencies"])
    optional = set().union(*(modules(extra) for extra in project["optional-dependencies"].values()))
    imported = third_party_imports()
    assert not imported - needed - optional, "imported, not declared in pyproject.toml"
    # TensorBoard is imported by Lightning's logger, not by us.
    assert not needed - imported - {"tensorboard"}, "declared in pyproject.toml, not imported"


def test_the_issue_s_extras_and_the_console_command_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"flash", "qlora", "report", "dev"} <= set(project["optional-dependencies"])
    assert project["scripts"] == {"difftune": "difftune.cli:main"}


def test_constraints_pin_every_dependency_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}

    def numbers(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", version))

    for requirement in project["dependencies"]:
        name, _, lowest = requirement.partition(">=")
        pinned = pins.get(name.lower().replace("_", "-"))
        assert pinned is not None, f"constraints.txt does not pin {name}"
        assert numbers(pinned) >= numbers(lowest), f"{name}: tested with {pinned}, but pyproject.toml wants {lowest}"


def test_the_scheduled_workflow_calls_targets_that_exist() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "newest.yml").read_text())
    # YAML 1.1 reads the key `on` as true.
    assert workflow[True]["schedule"]
    targets = {entry["target"] for entry in workflow["jobs"]["test"]["strategy"]["matrix"]["include"]}
    assert targets == {"test-newest", "test-lowest"}
    assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    # Nothing holds the newest back, and the oldest are those of pyproject.toml.
    newest = re.search(r"^test-newest:\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert newest is not None and "constraints" not in newest[1]


def test_ci_calls_what_the_readme_shows() -> None:
    ci, readme = (ROOT / ".ci" / "run").read_text(), (ROOT / "README.md").read_text()
    called = re.findall(r"^make (\w+)", ci, flags=re.MULTILINE)
    assert called == ["quickstart", "test", "check"]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"setup", "quickstart", "test", "check", "gpu", "bench"} <= targets
    for target in called:
        assert f"make {target}" in readme, f"README.md does not show `make {target}`"


def test_commands_in_prose_name_recipes_that_exist_and_parse() -> None:
    from difftune.cli import COMMANDS

    texts = [path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *RECIPES]]
    named = {match for text in texts for match in re.findall(r"recipes/[\w/]+\.yaml", text)}
    assert not [name for name in sorted(named) if not (ROOT / name).is_file()]
    commands = {match for text in texts for match in re.findall(r"^\s*#?\s*difftune (\w+)", text, flags=re.MULTILINE)}
    assert commands <= set(COMMANDS)


def test_every_yaml_of_the_project_is_yaml() -> None:
    for path in text_files():
        if path.suffix in (".yaml", ".yml"):
            assert isinstance(yaml.safe_load(path.read_text()), dict), relative(path)
