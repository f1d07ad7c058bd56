"""What `difftune plan` does with its options: plan, print, say by the exit code whether everything fits."""

from __future__ import annotations

import json

from difftune.config import Config
from difftune.plan.report import plan_values, print_plan
from difftune.plan.stages import plan_stages
from difftune.terminal import console, set_up_logging
from difftune.user_text import TextError, finite_number

_MAX_GPUS = 1_000_000
_MAX_GIB = 1_000_000


def plan(config: Config, options: dict[str, list[str]], *, as_json: bool = False) -> int:
    """Plan every stage of a recipe and print it.

    Args:
        config: The recipe.
        options: `gpus`, `gpu-memory`, `gpu` and `mfu`, as on the command line.
        as_json: Print one JSON list instead of tables.

    Returns:
        0 if every stage fits, 1 if one does not.

    Raises:
        ValueError: If an option is no number or out of range.
    """
    set_up_logging()
    gpus, memory, mfu = (_number(options, name) for name in ("gpus", "gpu-memory", "mfu"))
    if gpus is not None and (not 1 <= gpus <= _MAX_GPUS or gpus != int(gpus)):
        raise ValueError(f"--gpus must be a whole number between 1 and {_MAX_GPUS}, got {options['gpus'][0]}")
    if memory is not None and not 0 < memory <= _MAX_GIB:
        raise ValueError(f"--gpu-memory must be above 0 and at most {_MAX_GIB} GiB, got {memory:g}")
    plans = plan_stages(
        config,
        gpus=None if gpus is None else int(gpus),
        gpu_memory_gib=memory,
        gpu=options.get("gpu", ["H100"])[0],
        mfu=0.4 if mfu is None else mfu,
    )
    if as_json:
        print(json.dumps([plan_values(stage) for stage in plans], indent=1))
    else:
        for stage in plans:
            print_plan(stage, console)
    return 0 if all(stage.fits for stage in plans) else 1


def _number(options: dict[str, list[str]], name: str) -> float | None:
    if name not in options:
        return None
    try:
        return finite_number(options[name][0])
    except TextError as error:
        raise ValueError(f"--{name} {error}") from error
