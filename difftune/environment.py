"""What a run ran on: versions, hardware, the state of the checkout. Written to `environment.json`."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

PACKAGES = (
    "difftune",
    "torch",
    "lightning",
    "transformers",
    "tokenizers",
    "datasets",
    "safetensors",
    "math-verify",
    "numpy",
    "triton",
    "flash-attn",
)

TESTED = {
    "torch": "2.13.0",
    "lightning": "2.6.6",
    "transformers": "5.23.0",
    "tokenizers": "0.23.3",
    "peft": "0.21.2",
    "safetensors": "0.8.0",
    "datasets": "5.2.0",
    "math-verify": "0.9.0",
    "numpy": "2.4.6",
}
"""The newest versions that the whole test suite was run with: those of constraints.txt, which no wheel carries."""


# Not those of recipes: max_new_tokens, tokenizer, num_key_value_heads.
_SECRET_NAME = r"[\w.\-]*(?:(?<!num_)key|token(?!s|iz)|secret|passw|credential)[\w.\-]*"
_SECRET_VALUE = re.compile(
    rf"(?P<name>{_SECRET_NAME}[\"']?\s*[=:]\s*)(?:\"[^\"]*\"|'[^']*'|(?!\$\{{)[^\s,}}\]\"']+)", re.IGNORECASE
)
_IN_ADDRESS = re.compile(r"(://)[^/@\s]+@")


def describe_environment() -> dict[str, Any]:
    """Versions, devices, threads, command line and git commit, as plain JSON values; absent packages are null."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "devices": devices,
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(total_memory_bytes() / 2**30, 1),
        "command": mask_secrets(sys.argv),
        "git": _git_state(Path(__file__).parent),
    }


def mask_secrets(command: Sequence[str]) -> list[str]:
    """A command line with `***` for keys, tokens, secrets and passwords, and for those in addresses.

    Args:
        command: Its words. The value of a name follows `=` or `:` in the same word, or is the next one.

    Example:
        >>> mask_secrets(["fit", "judge.api_key=sk-1", "--hf-token", "hf_1", "evaluation.max_new_tokens=64"])
        ['fit', 'judge.api_key=***', '--hf-token', '***', 'evaluation.max_new_tokens=64']
    """
    masked, is_next_secret = [], False
    for word in command:
        shown = "***" if is_next_secret and not word.startswith("-") else word
        shown = _SECRET_VALUE.sub(r"\g<name>***", _IN_ADDRESS.sub(r"\1***@", shown))
        is_next_secret = word.startswith("--") and re.fullmatch(_SECRET_NAME, word, re.IGNORECASE) is not None
        masked.append(shown)
    return masked


def untested_versions() -> dict[str, tuple[str, str]]:
    """Packages that are newer than what was tested: name to (installed, newest tested).

    Example:
        >>> all(name in TESTED for name in untested_versions())
        True
    """
    found = {}
    for name, tested in TESTED.items():
        installed = version_of(name)
        # The release alone: 2.13.0+cpu is a build of 2.13.0, not something newer.
        if installed is not None and Version(installed).release > Version(tested).release:
            found[name] = (installed, tested)
    return found


def total_memory_bytes() -> int:
    """Memory of this machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def version_of(package: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that holds this package and whether it is changed; None for an installed package."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
