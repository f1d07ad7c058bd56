"""Run folders and result folders: damaged files, and a run that is another one."""

from collections.abc import Callable
from pathlib import Path

from tests.bad_inputs.case import Case, fit

_SAME = ("run_dir=finished", "checkpoint.every_n_steps=1", "export={format: difftune, verify: false}")
_MORE = ("trainer.max_steps=4",)
_NEWEST = "finished/checkpoints/main/step-00000003"
_EVALUATE = ("evaluate", "--model", "model", "--data", "synthetic:arithmetic", "--limit", "2", "--max-new-tokens", "2")


def _write(file: str, content: str | bytes) -> Callable[[Path], object]:
    def change(work: Path) -> None:
        (work / file).parent.mkdir(parents=True, exist_ok=True)
        (work / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def _damage_all(work: Path) -> None:
    for path in (work / "finished/checkpoints").rglob("manifest.json"):
        path.write_text("{")


def _more(name: str, prepare: Callable[[Path], object], *says: str, overrides: tuple[str, ...] = _MORE) -> Case:
    """A damaged run that is asked to train further."""
    return fit(f"run: {name}", *_SAME, *overrides, says=says, copies=("finished",), prepare=prepare)


def _unchanged(work: Path) -> None:
    pass


def _results(name: str, file: str, content: str, *says: str) -> Case:
    """A result folder with a damaged file, evaluated into again."""
    return Case(
        f"results: {name}",
        (*_EVALUATE, "--out", "res"),
        ("res", *says),
        files={file: content},
        copies=("model",),
    )


CASES: list[Case] = [
    _more("another width", _unchanged, "finished", "hidden_size", overrides=("model.hidden_size=64",)),
    _more("another tokenizer", _unchanged, "finished", "tokenizer", overrides=("tokenizer=bytes",)),
    _more("never resume", _unchanged, "finished", "never", overrides=("resume=never", *_MORE)),
    _more("a typing error in resume", _unchanged, "resume", "atuo", "auto", overrides=("resume=atuo", *_MORE)),
    _more(
        "a checkpoint that is not there",
        _unchanged,
        "resume",
        "step-00000009",
        overrides=("resume=finished/checkpoints/main/step-00000009", *_MORE),
    ),
    _more("config.yaml of text", _write("finished/config.yaml", "hello"), "config.yaml"),
    _more("config.yaml of nothing", _write("finished/config.yaml", ""), "config.yaml"),
    _more("config.yaml cut off", _write("finished/config.yaml", "model: {attention: "), "config.yaml"),
    _more("config.yaml not UTF-8", _write("finished/config.yaml", b"\xff\xfe"), "config.yaml"),
    _more("config.yaml with a tag", _write("finished/config.yaml", "!!python/name:os.system\n"), "config.yaml"),
    _more("config.yaml deep", _write("finished/config.yaml", "[" * 5000), "config.yaml"),
    _more("done.json cut off", _write("finished/checkpoints/main/done.json", "{"), "done.json"),
    _more("done.json of a list", _write("finished/checkpoints/main/done.json", "[]"), "done.json"),
    _more("done.json deep", _write("finished/checkpoints/main/done.json", "[" * 100_000), "done.json"),
    _more("every checkpoint damaged", _damage_all, "checkpoint"),
    _more(
        "the named checkpoint damaged",
        _write(f"{_NEWEST}/manifest.json", "{"),
        "step-00000003",
        overrides=(f"resume={_NEWEST}", *_MORE),
    ),
    Case(
        "export of a damaged checkpoint",
        ("export", _NEWEST, "--out", "o"),
        ("step-00000003",),
        copies=("finished",),
        prepare=_write(f"{_NEWEST}/manifest.json", "{"),
    ),
    *(
        Case(f"report: {name}", ("report", "finished"), ("finished", *says), copies=("finished",), prepare=prepare)
        for name, prepare, says in (
            ("metrics of text", _write("finished/metrics.jsonl", "hello\n"), ("metrics.jsonl",)),
            ("metrics of numbers", _write("finished/metrics.jsonl", "1\n2\n"), ("metrics.jsonl",)),
            ("metrics without values", _write("finished/metrics.jsonl", "{}\n"), ("metrics.jsonl",)),
            (
                "metrics of words",
                _write(
                    "finished/metrics.jsonl",
                    '{"step": "a", "tokens": 1, "name": "x", "value": "y", "stage": "main", "time": 1}\n',
                ),
                ("metrics.jsonl",),
            ),
            ("metrics not UTF-8", _write("finished/metrics.jsonl", b"\xff\n"), ("metrics.jsonl",)),
            ("config.yaml of a list", _write("finished/config.yaml", "- a\n"), ("config.yaml",)),
            ("config.yaml cut off", _write("finished/config.yaml", "a: {"), ("config.yaml",)),
            ("environment.json cut off", _write("finished/environment.json", "{"), ("environment.json",)),
        )
    ),
    *(
        Case(f"compare: {name}", ("compare", "finished"), ("finished", *says), copies=("finished",), prepare=prepare)
        for name, prepare, says in (
            ("metrics of text", _write("finished/metrics.jsonl", "hello\n"), ("metrics.jsonl",)),
            ("metrics of numbers", _write("finished/metrics.jsonl", "1\n2\n"), ("metrics.jsonl",)),
            ("metrics without values", _write("finished/metrics.jsonl", "{}\n"), ("metrics.jsonl",)),
            ("config.yaml of a list", _write("finished/config.yaml", "- a\n"), ("config.yaml",)),
            ("config.yaml cut off", _write("finished/config.yaml", "a: {"), ("config.yaml",)),
        )
    ),
    Case(
        "compare: a metric that nobody has",
        ("compare", "finished", "--metric", "nope"),
        ("nope",),
        copies=("finished",),
    ),
    _results("settings cut off", "res/settings.json", "{", "settings.json"),
    _results("settings of a list", "res/settings.json", "[]", "settings.json"),
    _results("settings of nothing", "res/settings.json", "{}", "settings.json"),
    _results("settings of another model", "res/settings.json", '{"model": "x", "tasks": {}}', "another"),
    fit("a folder of other files", "run_dir=mine", says=("mine", "notes.txt"), files={"mine/notes.txt": "x"}),
]
