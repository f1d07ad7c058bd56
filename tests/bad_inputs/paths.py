"""Paths: files where folders are needed and the reverse, links in circles, long names, NUL, no permission, no space."""

import os
from pathlib import Path

from tests.bad_inputs.case import TINY, Case, fit

_LONG = "a" * 300
_DEEP = "/".join(["d" * 200] * 30)


def _loop(work: Path) -> None:
    (work / "loop").symlink_to("loop")


def _dangling(work: Path) -> None:
    (work / "gone").symlink_to("/proc/no-such-disk/run")


def _file(work: Path) -> None:
    (work / "file").write_text("mine\n")


def _locked(work: Path) -> None:
    (work / "locked").mkdir()
    (work / "locked" / "rows.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    (work / "locked").chmod(0)


def _unreadable(work: Path) -> None:
    (work / "rows.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    (work / "rows.jsonl").chmod(0)
    os.chown(work / "rows.jsonl", 0, 0)


def _unreadable_recipe(work: Path) -> None:
    (work / "tiny.yaml").chmod(0)
    os.chown(work / "tiny.yaml", 0, 0)


def _read_only(work: Path) -> None:
    os.chown(work, 0, 0)
    work.chmod(0o555)


def _fifo(work: Path) -> None:
    os.mkfifo(work / "pipe.jsonl")


_EVALUATE = ("evaluate", "--model", "model", "--data", "synthetic:arithmetic", "--limit", "2", "--max-new-tokens", "2")
_EXPORT = ("export", "model", "--format", "difftune", "--out")

CASES: list[Case] = [
    # run_dir
    fit("run_dir is empty", "run_dir=''", says=("run_dir", "empty")),
    fit("run_dir is a blank", "run_dir=' '", says=("run_dir",)),
    fit("run_dir is a file", "run_dir=file", says=("run_dir", "file"), prepare=_file),
    fit("run_dir is below a file", "run_dir=file/run", says=("file/run",), prepare=_file),
    fit("run_dir is in /proc", "run_dir=/proc/nope", says=("/proc/nope", "run_dir")),
    fit("run_dir is in /sys", "run_dir=/sys/nope", says=("/sys/nope", "run_dir")),
    fit("run_dir is a device", "run_dir=/dev/null", says=("/dev/null", "run_dir")),
    fit("run_dir is a circle of links", "run_dir=loop", says=("loop", "run_dir"), prepare=_loop),
    fit("run_dir is below a circle of links", "run_dir=loop/run", says=("loop",), prepare=_loop),
    fit("run_dir is a link to nowhere", "run_dir=gone", says=("gone", "run_dir"), prepare=_dangling),
    fit("run_dir has a long name", f"run_dir={_LONG}", says=("run_dir", "long")),
    fit("run_dir is a long path", f"run_dir={_DEEP}", says=("run_dir", "long")),
    fit("run_dir has a NUL", 'run_dir="a\\0b"', says=("run_dir", "NUL")),
    fit("run_dir has a lone surrogate", 'run_dir="a\\ud800b"', says=("run_dir",)),
    fit("run_dir of a user that is not there", "run_dir='~no-such-user-x/run'", says=("~no-such-user-x",)),
    fit("run_dir may not be written", "run_dir=run", says=("run", "permission"), prepare=_read_only, as_nobody=True),
    fit("run_dir may not be entered", "run_dir=locked/run", says=("locked",), prepare=_locked, as_nobody=True),
    fit("run_dir with markup is a file", "run_dir='[bold]x'", says=("[bold]x",), files={"[bold]x": "mine"}),
    fit(
        "run_dir with a closing tag is a file",
        "run_dir='[/x]'",
        says=("[/x]",),
        files={"[": "", "x]": ""},
        prepare=lambda work: (work / "[").unlink() or (work / "[").mkdir() or (work / "[" / "x]").write_text("mine"),
    ),
    fit("run_dir holds config.yaml as a folder", "run_dir=r", says=("config.yaml",), files={"r/config.yaml/x": ""}),
    # recipes
    Case("a recipe is empty text", ("fit", "--config", ""), ("--config", "empty")),
    Case("a recipe is a circle of links", ("fit", "--config", "loop"), ("loop",), prepare=_loop),
    Case("a recipe has a long name", ("fit", "--config", _LONG + ".yaml"), (_LONG[:20],)),
    Case("a recipe has a NUL", ("fit", "--config", "a\0.yaml"), ("a",)),
    Case("a recipe is a pipe", ("fit", "--config", "pipe.jsonl"), ("pipe.jsonl", "file"), prepare=_fifo),
    Case("a recipe is endless", ("fit", "--config", "/dev/zero"), ("/dev/zero", "file")),
    Case(
        "a recipe may not be read",
        ("fit", "--config", "tiny.yaml"),
        ("tiny.yaml", "permission"),
        prepare=_unreadable_recipe,
        as_nobody=True,
    ),
    Case("a recipe with markup is not there", ("fit", "--config", "[bold]x.yaml"), ("[bold]x.yaml",)),
    Case("a recipe is in the home folder and not there", ("fit", "--config", "~/x.yaml"), ("x.yaml",)),
    # data
    *(
        fit(f"data {name}", f"data.train=[{{path: {path}}}]", says=says, **others)  # type: ignore[arg-type]
        for name, path, says, others in (
            ("is empty text", "''", ("data.train.0.path", "empty"), {}),
            ("is a blank", "' '", ("data.train.0.path",), {}),
            ("is not there", "none.jsonl", ("none.jsonl",), {}),
            ("is a folder of nothing", ".", (".jsonl",), {}),
            ("is a device", "/dev/zero", ("/dev/zero",), {}),
            ("is an endless file", "/dev/zero.jsonl", ("/dev/zero.jsonl",), {}),
            ("is a pipe", "pipe.jsonl", ("pipe.jsonl", "file"), {"prepare": _fifo}),
            ("is a circle of links", "loop", ("loop",), {"prepare": _loop}),
            ("is a link to nowhere", "gone", ("gone",), {"prepare": _dangling}),
            ("has a long name", f"{_LONG}.jsonl", (_LONG[:20],), {}),
            ("has a NUL", '"a\\0b.jsonl"', ("NUL",), {}),
            ("is below a file", "file/x.jsonl", ("file/x.jsonl",), {"prepare": _file}),
            (
                "may not be read",
                "rows.jsonl",
                ("rows.jsonl", "permission"),
                {"prepare": _unreadable, "as_nobody": True},
            ),
            ("may not be entered", "locked", ("locked", "permission"), {"prepare": _locked, "as_nobody": True}),
            ("is in the home folder and not there", "'~/none.jsonl'", ("none.jsonl",), {}),
            ("of a user that is not there", "'~no-such-user-x/a.jsonl'", ("~no-such-user-x",), {}),
            ("with markup is not there", "'[bold]x.jsonl'", ("[bold]x.jsonl",), {}),
        )
    ),
    # other keys that are paths
    *(
        fit(f"{key} {name}", f"{key}={path}", *beside, says=says, prepare=prepare)
        for key, beside in (
            ("tokenizer", ()),
            ("model.path", ("tokenizer=null",)),
            ("distill.teacher", ()),
            ("data.cache_dir", ()),
        )
        for name, path, says, prepare in (
            ("is empty text", "''", ("empty",), None),
            ("has a NUL", '"a\\0b"', ("NUL",), None),
            ("is a circle of links", "./loop", ("loop",), _loop),
            ("is a file", "./file", ("file",), _file),
            ("has a long name", f"./{_LONG}", (), None),
            ("of a user that is not there", "'~no-such-user-x/a'", ("~no-such-user-x",), None),
        )
    ),
    fit("cache_dir is in /proc", "data.cache_dir=/proc/nope", says=("/proc/nope",)),
    fit("resume is a circle of links", "resume=loop", says=("resume", "loop"), prepare=_loop),
    fit("resume is a word", "resume=yes", says=("resume", "yes", "auto", "never")),
    fit("resume is not there", "resume=run/checkpoints/main/step-9", says=("resume", "step-9")),
    fit("resume is empty", "resume=''", says=("resume",)),
    fit("resume has a NUL", 'resume="a\\0b"', says=("resume", "NUL")),
    # what is written
    Case("evaluate into a file", (*_EVALUATE, "--out", "file"), ("file", "--out"), prepare=_file, copies=("model",)),
    Case("evaluate below a file", (*_EVALUATE, "--out", "file/x"), ("file/x",), prepare=_file, copies=("model",)),
    Case("evaluate into /proc", (*_EVALUATE, "--out", "/proc/x"), ("/proc/x",), copies=("model",)),
    Case("evaluate into a circle", (*_EVALUATE, "--out", "loop"), ("loop",), prepare=_loop, copies=("model",)),
    Case("evaluate into a long name", (*_EVALUATE, "--out", _LONG), ("long",), copies=("model",)),
    Case("evaluate into nothing", (*_EVALUATE, "--out", ""), ("--out", "empty"), copies=("model",)),
    Case("evaluate into a NUL", (*_EVALUATE, "--out", "a\0b"), ("--out", "NUL"), copies=("model",)),
    Case("export into a file", (*_EXPORT, "file"), ("file",), prepare=_file, copies=("model",)),
    Case("export over a file", (*_EXPORT, "file", "--overwrite"), ("file",), prepare=_file, copies=("model",)),
    Case("export below a file", (*_EXPORT, "file/x"), ("file", "folder is needed"), prepare=_file, copies=("model",)),
    Case("export into /proc", (*_EXPORT, "/proc/x"), ("/proc/",), copies=("model",)),
    Case("export into a circle", (*_EXPORT, "loop"), ("loop",), prepare=_loop, copies=("model",)),
    Case("export into a long name", (*_EXPORT, _LONG), ("long",), copies=("model",)),
    Case("export into a NUL", (*_EXPORT, "a\0b"), ("NUL",), copies=("model",)),
    Case(
        "export over what is no model",
        (*_EXPORT, "mine", "--overwrite"),
        ("mine",),
        files={"mine/a.txt": "x"},
        copies=("model",),
    ),
    Case(
        "convert into a file",
        ("convert", "model", "--to", "diffllama", "--out", "file"),
        ("file",),
        prepare=_file,
        copies=("model",),
    ),
    Case(
        "convert into a long name",
        ("convert", "model", "--to", "diffllama", "--out", _LONG),
        ("long",),
        copies=("model",),
    ),
    Case(
        "merge into a file",
        ("merge", "adapter", "--out", "file"),
        ("file",),
        prepare=_file,
        copies=("adapter", "model"),
    ),
    Case(
        "report into /dev/full",
        ("report", "finished", "--out", "/dev/full"),
        ("/dev/full", "space"),
        copies=("finished",),
    ),
    Case("report into /proc", ("report", "finished", "--out", "/proc/x.html"), ("/proc/x.html",), copies=("finished",)),
    # where letters are few
    Case(
        "an unknown key on an ASCII terminal",
        ("fit", "--config", "tiny.yaml", "k\u00e9y=1"),
        ("unknown key",),
        env={"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    ),
    Case(
        "a lost file on an ASCII terminal",
        ("fit", "--config", "\u4f60.yaml"),
        ("not found",),
        env={"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    ),
    Case(
        "a recipe of another tongue on an ASCII terminal",
        ("fit", "--config", "u.yaml"),
        ("unknown key",),
        files={"u.yaml": TINY + "cl\u00e9: 1\n"},
        env={"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    ),
]
