"""`difftune doctor`: what this machine has, what is missing and why, and whether a recipe could start on it."""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from difftune.commands.doctor_ranks import reach_ranks
from difftune.config import Config, load_config
from difftune.environment import TESTED, describe_environment, total_memory_bytes, untested_versions, version_of
from difftune.ops import flash
from difftune.ops.diff_attention import choose_backend
from difftune.ops.triton import coverage
from difftune.terminal import console, is_first_rank, set_up_logging
from difftune.training.devices import device_problem
from difftune.training.strategies import kind_of_device
from difftune.verification.precision import describe, try_precision

FLASH_ATTN = "2.8.3"
"""The flash-attn whose wheel is named: the last one of version 2 that the extra `flash` asks for."""
DISK_BYTES = 64 * 2**20
"""Written to measure a disk."""
HUB_TIMEOUT_S = 3.0
"""Seconds after which the hub counts as out of reach."""
_GIB = 2**30
_COLOURS = {"ok": "green", "note": "yellow", "fault": "red"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    kind: Literal["ok", "note", "fault"]
    """A fault keeps a run from starting; a note does not."""
    text: str


def diagnose(config_file: str | None, overrides: Sequence[str] = ()) -> int:
    """Look at everything, print it, and say whether `fit` with this recipe could start.

    Under torchrun all ranks take part, and the first one prints.

    Args:
        config_file: The recipe; None with no overrides: the machine alone.
        overrides: As of `fit`.

    Returns:
        0 if nothing is in the way, 1 if something is.
    """
    set_up_logging()
    found: list[Finding] = []
    config: Config | None = None
    if config_file is not None or overrides:
        try:
            config = load_config(config_file, overrides)
            found.append(Finding("recipe", "ok", config_file or "from the command line"))
        except (ValueError, FileNotFoundError) as error:
            found.append(Finding("recipe", "fault", str(error)))
    found += [*find_versions(), *find_devices(config), *find_backends(config), find_wheel()]
    found += find_trials(config, can_run=not any(finding.kind == "fault" for finding in found))
    found += [*reach_ranks_of(config), *find_disk(config), find_shared_memory(config), *find_hub(config)]
    faults = [finding for finding in found if finding.kind == "fault"]
    if is_first_rank():
        for finding in found:
            console.print(
                f"[{_COLOURS[finding.kind]}]{finding.kind:<5}[/] [bold]{finding.what}[/]: ",
                end="",
                soft_wrap=True,
                markup=True,
            )
            console.print(finding.text, highlight=False, markup=False, soft_wrap=True)
        subject = "fit" if config is None else f"fit --config {config_file}" if config_file else "this recipe"
        names = ", ".join(dict.fromkeys(finding.what for finding in faults))
        verdict = f"{subject} could not start: {names}" if faults else f"nothing keeps {subject} from starting"
        console.print(verdict, highlight=False, markup=False, soft_wrap=True)
    return 1 if faults else 0


def find_versions() -> list[Finding]:
    """Versions of what is needed, what of it is not there, and what is newer than the versions that were tested."""
    environment = describe_environment()
    missing = [name for name in TESTED if version_of(name) is None]
    versions = ", ".join(f"{name} {version_of(name)}" for name in TESTED if name not in missing)
    found = [Finding("versions", "ok", f"Python {environment['python']} on {environment['platform']}; {versions}")]
    if missing:
        found.append(Finding("packages", "fault", f"not installed: {', '.join(missing)}; pip install difftune"))
    newer = [f"{name} {here} (tested up to {tested})" for name, (here, tested) in untested_versions().items()]
    if newer:
        tested = " ".join(f"{name}=={tested}" for name, (_, tested) in untested_versions().items())
        remedy = f"if something fails: pip install {tested}"
        found.append(Finding("versions", "note", f"newer than what was tested: {', '.join(newer)}; {remedy}"))
    return found


def find_devices(config: Config | None) -> list[Finding]:
    """Memory of the machine; its GPUs, or why there are none; whether the recipe asks for more."""
    memory = f"{os.cpu_count()} cores, {total_memory_bytes() / _GIB:.1f} GiB of memory"
    found = [Finding("machine", "ok", memory)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        text = f"{properties.name}, {properties.total_memory / _GIB:.1f} GiB, compute capability "
        text += f"{properties.major}.{properties.minor}, CUDA {torch.version.cuda}"
        found.append(Finding(f"GPU {index}", "ok", text))
    if not torch.cuda.is_available():
        build = f"this torch is built for CUDA {torch.version.cuda}, and the driver shows no device"
        reason = build if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
        found.append(Finding("GPU", "note", f"none: {reason}"))
    for stage in [] if config is None else config.resolved_stages():
        trainer = stage.trainer
        problem = device_problem(trainer.accelerator, trainer.devices, trainer.num_nodes)
        if problem is not None:
            found.append(Finding("devices", "fault", f"stage {stage.name}: {problem}"))
        elif trainer.accelerator == "auto" and kind_of_device("auto") == "cpu":
            text = f"stage {stage.name}: trainer.accelerator=auto comes to the CPU, there is no GPU here"
            found.append(Finding("devices", "note", text))
    return found


def find_backends(config: Config | None) -> list[Finding]:
    """Which attentions run here for the heads of the recipe's model, what `auto` would take, why others do not run."""
    kind, head_dim, dtype, asked, origin = "diff_v1", 128, torch.bfloat16, "auto", "heads of 128"
    if config is not None:
        from difftune.plan.model import architecture

        try:
            shape = architecture(config)
        except ValueError as error:
            return [Finding("model", "fault", str(error))]
        assert shape.head_dim is not None
        kind, head_dim, asked = shape.attention, shape.head_dim, config.model.attention_backend
        half = any(stage.trainer.precision != "32-true" for stage in config.resolved_stages())
        dtype = torch.bfloat16 if half and config.model.dtype == "float32" else getattr(torch, config.model.dtype)
        origin = f"{kind}, heads of {head_dim}, {str(dtype).removeprefix('torch.')}"
    accelerator = "auto" if config is None else config.resolved_stages()[0].trainer.accelerator
    device = kind_of_device(accelerator)
    device = device if device != "cuda" or torch.cuda.is_available() else "cpu"
    width = 2 * head_dim if kind == "diff_v1" else head_dim
    keys = 2 if kind == "diff_v1" else 1
    q = torch.empty(1, 16, 1, 2, head_dim, device=device, dtype=dtype)
    k = torch.empty(1, 16, 1, keys, head_dim, device=device, dtype=dtype)
    v = torch.empty(1, 16, 1, width, device=device, dtype=dtype)

    def why_not_triton(auto: bool) -> str | None:
        if kind == "softmax":
            return "its kernels compute differential attention, this is softmax"
        return coverage.why_not(q, k, v, head_dim**-0.5, auto=auto) if coverage.INSTALLED else coverage.INSTALL

    reasons = {"reference": None, "sdpa": None, "triton": why_not_triton(False), "flash": None}
    if not flash.is_available():
        reasons["flash"] = f"flash-attn is not installed: {flash.INSTALL}"
    elif not flash.supports(q):
        reasons["flash"] = f"flash-attn takes 16 bits on CUDA and heads up to {flash.MAX_HEAD_DIM}"
    # What is chosen stands in the finding; the operator would log it too.
    logging.getLogger("difftune.ops").setLevel(logging.WARNING)
    chosen = choose_backend("auto", q, lambda: why_not_triton(True))
    logging.getLogger("difftune.ops").setLevel(logging.NOTSET)
    runs = [name for name, reason in reasons.items() if reason is None]
    found = [Finding("attention", "ok", f"{', '.join(runs)} run here for {origin} on {device}; auto takes {chosen}")]
    for name, reason in reasons.items():
        if reason is not None:
            found.append(Finding(f"backend {name}", "fault" if asked == name else "note", reason))
    if config is not None and config.model.quantization is not None and not importlib.util.find_spec("bitsandbytes"):
        found.append(Finding("bitsandbytes", "fault", "not installed, and model.quantization needs it"))
    return found


def find_trials(config: Config | None, *, can_run: bool = True) -> list[Finding]:
    """Whether a step and a padded generated batch work in the precision of each stage.

    They are tried on two narrow layers with the attention of the recipe's model, so that any model is tried quickly.

    Args:
        config: The recipe.
        can_run: Nothing that a trial needs is missing.
    """
    if config is None or not is_first_rank():
        return []
    if not can_run:
        return [Finding("trial", "note", "no step was tried: mend the faults above first")]
    from difftune.plan.model import architecture

    found = []
    shape, dtype = architecture(config), getattr(torch, config.model.dtype)
    stages = [(stage.trainer.precision, stage.trainer.accelerator) for stage in config.resolved_stages()]
    for precision, accelerator in dict.fromkeys(stages):
        what = f"trial in {precision}"
        try:
            trial = try_precision(
                shape, precision, accelerator, dtype=dtype, attention_backend=config.model.attention_backend
            )
        except (ValueError, RuntimeError) as error:
            found.append(Finding(what, "fault", str(error)))
        else:
            text = "one step and one padded generated batch of two layers with the recipe's attention, weights in "
            found.append(Finding(what, "ok", f"{text}{config.model.dtype}: {describe(trial)}"))
    return found


def find_wheel() -> Finding:
    """The flash-attn wheel for this torch, CUDA, Python and platform."""
    name = flash_wheel(
        torch.__version__, torch.version.cuda, torch.compiled_with_cxx11_abi(), sys.version_info[:2], platform.machine()
    )
    if name is None or sys.platform != "linux":
        reason = f"torch {torch.__version__} is built without CUDA" if name is None else "wheels are for Linux"
        return Finding("flash-attn wheel", "note", f"none fits: {reason}")
    return Finding(
        "flash-attn wheel",
        "ok" if flash.is_available() else "note",
        f"{name}; where github.com/Dao-AILab/flash-attention has no release of this name, it is built: "
        "pip install --no-build-isolation 'difftune[flash]'",
    )


def flash_wheel(
    torch_version: str, cuda: str | None, cxx11_abi: bool, python: tuple[int, int], machine: str
) -> str | None:
    """File name of the wheel that fits, as the releases are named; None without CUDA.

    Example:
        >>> flash_wheel("2.8.0+cu128", "12.8", True, (3, 11), "x86_64")
        'flash_attn-2.8.3+cu12torch2.8cxx11abiTRUE-cp311-cp311-linux_x86_64.whl'
    """
    if cuda is None:
        return None
    release = ".".join(torch_version.split("+")[0].split(".")[:2])
    tag = f"cp{python[0]}{python[1]}"
    abi = str(cxx11_abi).upper()
    major = cuda.split(".")[0]
    return f"flash_attn-{FLASH_ATTN}+cu{major}torch{release}cxx11abi{abi}-{tag}-{tag}-linux_{machine}.whl"


def reach_ranks_of(config: Config | None) -> list[Finding]:
    """Whether processes reach one another: those of torchrun, or two that are started here."""
    accelerator = "auto" if config is None else config.resolved_stages()[0].trainer.accelerator
    needed = config is not None and any(
        stage.trainer.num_nodes > 1 or stage.trainer.devices not in (1, "1", "auto")
        for stage in config.resolved_stages()
    )
    found = []
    for reached in reach_ranks(use_cuda=kind_of_device(accelerator) == "cuda" and torch.cuda.is_available()):
        kind: Literal["ok", "note", "fault"] = "ok" if reached.works else "fault" if needed else "note"
        found.append(Finding(f"ranks over {reached.backend}", kind, reached.text))
    return found


def find_disk(config: Config | None) -> list[Finding]:
    """Space and speed of the disk of the run folder, and whether it takes the checkpoints."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return []  # one process of a machine is enough
    folder = Path("runs" if config is None else config.run_dir).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    where = f"run_dir {folder}" if there == folder else f"run_dir {folder} (not there yet; {there} is)"
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".difftune-doctor-") as file:
            block = os.urandom(2**20)
            started = time.perf_counter()
            for _ in range(DISK_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = DISK_BYTES / (time.perf_counter() - started) / 2**20
    except OSError as error:
        return [Finding("disk", "fault", f"{where} cannot be written: {error}; set run_dir")]
    free = shutil.disk_usage(there).free
    text = f"{where}: {free / _GIB:,.1f} GiB free, {speed:,.0f} MiB/s written and synced"
    needed = 0 if config is None else _checkpoint_bytes(config)
    if not needed:
        return [Finding("disk", "ok", text)]
    assert config is not None
    # The newest ones, the best one, and the one that is being written.
    count = max(stage.checkpoint.keep_last for stage in config.resolved_stages()) + 2
    text += f"; {count} checkpoints take up to {count * needed / _GIB:,.2f} GiB, {needed / speed / 2**20:,.0f} s each"
    return [Finding("disk", "ok" if count * needed < free else "fault", text)]


def _checkpoint_bytes(config: Config) -> int:
    from difftune.plan.model import architecture, build_skeleton, tensor_bytes

    try:
        model = build_skeleton(config, architecture(config), None)
    except ValueError:
        return 0  # said of the model
    trained = tensor_bytes(model, trained=True)
    return 3 * trained


def find_shared_memory(config: Config | None) -> Finding:
    """Size of `/dev/shm`, through which workers and NCCL pass data; containers often have 64 MiB."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding("shared memory", "note", "no /dev/shm on this system")
    size = shutil.disk_usage(path).total
    text = f"/dev/shm has {size / _GIB:,.2f} GiB"
    if size >= _GIB:
        return Finding("shared memory", "ok", text)
    return Finding(
        "shared memory", "note", f"{text}, little for workers and NCCL: docker run --ipc host, or --shm-size 8g"
    )


def find_hub(config: Config | None) -> list[Finding]:
    """Whether the Hugging Face hub answers, and whether the recipe names what only it has."""
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        reached, text = False, "HF_HUB_OFFLINE is set: only what is in the cache can be had"
    else:
        started = time.perf_counter()
        try:
            with urllib.request.urlopen(f"{constants.ENDPOINT}/api/models?limit=1", timeout=HUB_TIMEOUT_S):
                reached = True
            text = f"{constants.ENDPOINT} answers in {time.perf_counter() - started:.1f} s"
        except (urllib.error.URLError, OSError) as error:
            reached, text = (
                False,
                f"{constants.ENDPOINT} does not answer ({error}): only what is in the cache can be had",
            )
    found = [Finding("hub", "ok" if reached else "note", text)]
    for name in [] if config is None else _hub_ids(config):
        cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
        if not cached and not reached:
            found.append(
                Finding("hub", "fault", f"{name} is no folder here, not in the cache, and the hub is out of reach")
            )
    for path in [] if config is None else _missing_files(config):
        found.append(Finding("files", "fault", f"{path} is not there"))
    return found


def _hub_ids(config: Config) -> list[str]:
    """What a recipe names that is no folder here but could be a repository: models and tokenizers."""
    from difftune.checkpoints.folders import could_be_hub_id

    return [name for name in _named_models(config) if could_be_hub_id(name)]


def _named_models(config: Config) -> list[str]:
    """What a recipe names in the place of a model or a tokenizer, and no folder here is called."""
    teachers = [stage.distill.teacher for stage in config.resolved_stages()]
    named = [config.model.path, config.tokenizer, *teachers]
    return [name for name in dict.fromkeys(named) if name and not Path(name).expanduser().exists()]


def _missing_files(config: Config) -> list[str]:
    """Folders and training files that a recipe names, the latter by their suffix, and that are not there."""
    paths = [source.path for stage in config.resolved_stages() for source in stage.data.train]
    local = [path for path in dict.fromkeys(paths) if path.endswith((".jsonl", ".json", ".parquet"))]
    # The model's own is said with the model.
    folders = [n for n in _named_models(config) if "/" in n and n not in (*_hub_ids(config), config.model.path)]
    return [*folders, *(path for path in local if not Path(path).expanduser().exists())]
