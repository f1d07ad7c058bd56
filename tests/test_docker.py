"""What can be checked of images and launchers without docker, GPUs or Slurm."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from difftune.cli import COMMANDS, parse
from difftune.config import load_config
from tests.conftest import ROOT

DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile*"))
SCRIPTS = [DOCKER / "slurm.sbatch", DOCKER / "torchrun.sh"]
SCALE = ROOT / "docs" / "how-to" / "scale.md"


def joined(path: Path) -> list[str]:
    """Lines without comments, those that end in a backslash joined with the next."""
    text = re.sub(r"\\\n\s*", " ", path.read_text())
    return [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def our_commands(lines: list[str]) -> list[list[str]]:
    """Arguments of every call of difftune or cli.py, with the variables of the shell filled in."""
    values = {
        "$recipe": "recipes/math_stage1.yaml",
        "$SLURM_NTASKS_PER_NODE": "8",
        "$SLURM_NNODES": "2",
        "$GPUS": "8",
        "$NODES": "2",
    }
    found = []
    for line in lines:
        for name, value in values.items():
            line = line.replace(f'"{name}"', value)
        line = line.replace('"$@"', "model.path=DIR")
        words = shlex.split(line)
        for program in ("cli.py", "difftune"):
            if program in words:
                found.append(words[words.index(program) + 1 :])
                break
    return found


def test_there_is_an_image_for_gpus_and_one_for_the_cpu() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile", "Dockerfile.cpu"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_copies_what_is_there_and_installs_the_tested_versions(path: Path) -> None:
    lines = joined(path)
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert {"pyproject.toml", "constraints.txt"} <= set(copied)
    assert not [name for name in copied if not (ROOT / name).exists()]
    installs = [part for line in lines for part in re.split(r"&&|;", line) if "pip install" in part]
    # Tools that compile flash-attn are not packages of ours.
    ours = [part for part in installs if "ninja" not in part]
    assert ours and all("-c constraints.txt" in part for part in ours)
    extras = {extra for part in ours for names in re.findall(r"\.\[([\w,-]+)\]", part) for extra in names.split(",")}
    declared = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert extras <= set(declared)


def test_no_version_is_pinned_in_an_image_that_the_constraints_pin_otherwise() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    for path in DOCKERFILES:
        for name, version in re.findall(r"\b([\w.-]+)==([\w.]+)", path.read_text()):
            assert pins.get(name) == version, f"{path.name} pins {name}=={version}"
    # The wheels of torch come from the index of the CUDA that the image has.
    text = (DOCKER / "Dockerfile").read_text()
    major, minor = re.search(r"^ARG CUDA=(\d+)\.(\d+)", text, flags=re.MULTILINE).groups()  # type: ignore[union-attr]
    assert f"download.pytorch.org/whl/cu{major}{minor}" in text


def test_what_a_run_writes_does_not_enter_an_image() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", "runs", ".venv", "wandb", "mlruns"} <= set(ignored)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_launcher_parses_and_calls_difftune_with_keys_that_exist(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""
    commands = our_commands(joined(path))
    assert commands
    for arguments in commands:
        found = parse(arguments)
        assert found.command in ("fit", "doctor")
        load_config(ROOT / found.values["config"][0], found.overrides, command="fit")


def test_slurm_starts_one_task_a_gpu_and_signals_before_the_end() -> None:
    text = (DOCKER / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, flags=re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8" and options["nodes"] == "2"
    assert options["signal"].startswith("USR1@") and "requeue" in options
    # Nothing but options stands before the first command: Slurm reads no further.
    head = text[: text.index("set -euo")]
    assert all(line.startswith("#") for line in head.splitlines())


def test_the_commands_of_the_guide_are_understood() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", SCALE.read_text(), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    commands = our_commands(lines)
    assert len(commands) == len([line for line in lines if not line.startswith("sbatch")]) >= 7
    for arguments in commands:
        found = parse(arguments)
        assert found.command in COMMANDS
        if not COMMANDS[found.command].reads_recipe:
            continue
        command = "plan" if found.command == "plan" else "fit"
        load_config(ROOT / found.values["config"][0], found.overrides, command=command)
    for script in re.findall(r"docker/[\w.]+\.(?:sh|sbatch)", SCALE.read_text()):
        assert (ROOT / script).is_file()
