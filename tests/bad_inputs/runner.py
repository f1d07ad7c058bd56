"""Runs wrong inputs, each in a process forked from one that has imported everything, and judges how they end."""

import hashlib
import logging
import os
import pwd
import re
import shutil
import signal
import stat
import sys
import time
import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.bad_inputs.case import TINY, Case

LIMIT_S = 10.0
"""Longer than this, a wrong input hangs."""
_MESSAGE = "difftune: error: "


@dataclass
class Verdict:
    """How a wrong input ended."""

    case: Case
    code: int | None
    """None: it hung and was killed."""
    output: str
    seconds: float
    faults: list[str] = field(default_factory=list)


def import_everything() -> None:
    """Import once what the commands import when they are needed."""
    import difftune.checkpoints.merge
    import difftune.commands.adapters
    import difftune.commands.convert
    import difftune.commands.doctor
    import difftune.commands.run
    import difftune.commands.verify
    import difftune.report.compare
    import difftune.report.page  # noqa: F401


def run_cases(cases: Iterable[Case], made: Path | None = None) -> list[Verdict]:
    """Run cases, each in its own folder, home and process.

    Args:
        cases: What to try.
        made: Where `make_folders` put the folders that cases copy. None: none of them does.
    """
    verdicts = []
    with TemporaryDirectory(prefix="difftune-bad-inputs-") as temporary:
        root = Path(temporary).resolve()
        root.chmod(0o755)
        for number, case in enumerate(cases):
            verdicts.append(_run(case, root / str(number), made))
    return verdicts


def make_folders(target: Path) -> None:
    """A model, a run that has ended and an adapter, for cases to copy and to damage.

    Raises:
        RuntimeError: If one cannot be made.
    """
    target.mkdir(parents=True, exist_ok=True)
    (target / "tiny.yaml").write_text(TINY)
    train = ("fit", "--config", "tiny.yaml")
    end = ("checkpoint.every_n_steps=1", "export={format: difftune, verify: false}")
    for argv in (
        (*train, "run_dir=finished", *end),
        ("export", "finished/export", "--format", "difftune", "--out", "model", "export.verify=false"),
        (*train, "run_dir=adapted", "model.path=model", "tokenizer=null", "adapter={rank: 2}", "export={}"),
    ):
        code, output, _ = _fork(argv, target, target, {}, as_nobody=False, limit_s=120.0)
        if code != 0:
            raise RuntimeError(f"{' '.join(argv)} ended with {code}:\n{output}")
    (target / "adapted" / "export").rename(target / "adapter")


def _run(case: Case, folder: Path, made: Path | None) -> Verdict:
    work, home = folder / "work", folder / "home"
    work.mkdir(parents=True)
    home.mkdir()
    (work / "tiny.yaml").write_text(TINY)
    for name in case.copies:
        assert made is not None, f"{case.name} copies {name}"
        shutil.copytree(made / name, work / name, symlinks=True)
    for name, content in case.files.items():
        path = home / name[2:] if name.startswith("~/") else work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    if case.as_nobody:
        nobody = pwd.getpwnam("nobody")
        for path in (work, home, *work.rglob("*"), *home.rglob("*")):
            os.chown(path, nobody.pw_uid, nobody.pw_gid, follow_symlinks=False)
    if case.prepare is not None:
        case.prepare(work)
    before = _listing(work) | _listing(home)
    argv = tuple(argument.replace("{home}", str(home)) for argument in case.argv)
    code, output, seconds = _fork(argv, work, home, case.env, as_nobody=case.as_nobody, limit_s=LIMIT_S)
    verdict = Verdict(case, code, output, seconds)
    verdict.faults = _faults(verdict, before, _listing(work) | _listing(home))
    return verdict


def _fork(
    argv: tuple[str, ...], work: Path, home: Path, env: dict[str, str] | object, *, as_nobody: bool, limit_s: float
) -> tuple[int | None, str, float]:
    """Call the command line in a child; its exit code (None: killed at the limit), its output and its seconds."""
    log = work.parent / "output"
    sys.stdout.flush()
    sys.stderr.flush()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = _become_command(argv, work, home, env, log, as_nobody)
        finally:
            os._exit(code)
    status: int | None = None
    while status is None:
        ended, found = os.waitpid(child, os.WNOHANG)
        if ended:
            status = found
        elif time.monotonic() - started > limit_s:
            break
        else:
            time.sleep(0.005)
    seconds = time.monotonic() - started
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it started ends with it
    if status is None:
        os.waitpid(child, 0)
    code = None if status is None else os.waitstatus_to_exitcode(status)
    output = log.read_text(encoding="utf-8", errors="backslashreplace")
    log.unlink()
    return code, output, seconds


def _become_command(argv: tuple[str, ...], work: Path, home: Path, env: object, log: Path, as_nobody: bool) -> int:
    os.setsid()
    os.chdir(work)
    for name in ("XDG_CACHE_HOME", "HF_HOME", "COLUMNS", "FORCE_COLOR"):
        os.environ.pop(name, None)
    os.environ.update({"HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "NO_PROXY": "127.0.0.1"})
    assert isinstance(env, dict) or hasattr(env, "items")
    os.environ.update(dict(env.items()))
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115 - lives as long as the process
    sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    for handler in logging.getLogger("difftune").handlers[:]:
        logging.getLogger("difftune").removeHandler(handler)
    warnings.simplefilter("ignore")
    if as_nobody and os.getuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.setgroups([])
        os.setgid(nobody.pw_gid)
        os.setuid(nobody.pw_uid)
    from difftune.cli import main

    try:
        code = main(list(argv))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _listing(folder: Path) -> set[str]:
    """Every path below a folder, with the content of each file: what is new or changed shows."""
    found = set()
    for path in folder.rglob("*"):
        entry = path.lstat()
        # Who may not read a file could not have written it either; a pipe would be waited for.
        plain = stat.S_ISREG(entry.st_mode)
        content = hashlib.sha256(path.read_bytes()).hexdigest() if plain else oct(entry.st_mode)
        found.add(f"{path}" if path.is_dir() else f"{path} {content}")
    return found


def _faults(verdict: Verdict, before: set[str], after: set[str]) -> list[str]:
    """What is wrong with how a case ended; nothing if it ended as it should."""
    faults = []
    case, output = verdict.case, verdict.output
    if verdict.code is None:
        faults.append(f"hung: more than {LIMIT_S:g} seconds")
    elif verdict.code == 0:
        faults.append("silent acceptance: exit code 0")
    elif verdict.code != 2:
        faults.append(f"exit code {verdict.code}")
    if "Traceback (most recent call last)" in output:
        faults.append("traceback")
    messages = output.count(_MESSAGE)
    if verdict.code == 2 and messages != 1:
        faults.append(f"{messages} messages")
    message = output.partition(_MESSAGE)[2]
    if verdict.code == 2 and (lacking := [word for word in case.says if word.lower() not in message.lower()]):
        faults.append(f"the message does not say {lacking}")
    if len(message) > 3000:
        faults.append(f"the message has {len(message)} characters")
    new = sorted(after - before)
    new = [path for path in new if not any(re.search(f"/{re.escape(name)}(/|$| )", path) for name in case.may_write)]
    if new:
        faults.append(f"{len(new)} files left behind or changed, such as {new[0].split('/', 5)[-1]}")
    return faults
