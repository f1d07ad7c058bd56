"""Judges: addresses that are none, and an endpoint that refuses."""

from tests.bad_inputs.case import Case, fit

_ROWS = {"docs.jsonl": '{"document": "A cat sat on 1 mat.", "summary": "A cat sat."}\n'}


def _judge(name: str, *settings: str, says: tuple[str, ...], **others: object) -> Case:
    argv = ("evaluate", "--model", "model", "--task", "hallucination:docs.jsonl", "hallucination.max_new_tokens=2")
    argv += tuple(f"hallucination.{setting}" for setting in settings)
    return Case(name, argv, says, **{"files": _ROWS, "copies": ("model",), **others})  # type: ignore[arg-type]


_ENDPOINT = ("judge=endpoint", "retries=0", "cache_dir=judged")

CASES: list[Case] = [
    _judge("an unknown judge", "judge=oracle", says=("judge", "oracle", "endpoint")),
    _judge("an endpoint without an address", "judge=endpoint", says=("url", "endpoint")),
    _judge("an address of nothing", *_ENDPOINT, "url=''", says=("url",)),
    _judge("an address without http", *_ENDPOINT, "url=localhost:8000/v1", says=("url", "localhost:8000/v1", "http")),
    _judge("an address of a file", *_ENDPOINT, "url='file:///etc/passwd'", says=("url", "file:///etc/passwd", "http")),
    _judge("an address of FTP", *_ENDPOINT, "url='ftp://127.0.0.1/v1'", says=("url", "ftp", "http")),
    _judge("an address without a host", *_ENDPOINT, "url='http://'", says=("url", "http://")),
    _judge("an address with a port of text", *_ENDPOINT, "url='http://127.0.0.1:abc/v1'", says=("url", "abc")),
    _judge("an address with a huge port", *_ENDPOINT, "url='http://127.0.0.1:99999/v1'", says=("url", "99999")),
    _judge("an address with a blank", *_ENDPOINT, "url='http://127.0.0.1/a b'", says=("url",)),
    _judge("an address with a NUL", *_ENDPOINT, 'url="http://127.0.0.1/a\\0b"', says=("url",)),
    _judge("an address with a new line", *_ENDPOINT, 'url="http://127.0.0.1/a\\nb"', says=("url",)),
    _judge("an address with broken brackets", *_ENDPOINT, "url='http://[::1/v1'", says=("url",)),
    _judge("attempts below 0", *_ENDPOINT, "url='http://127.0.0.1:9/v1'", "retries=-1", says=("retries", "-1")),
    _judge(
        "attempts without end",
        *_ENDPOINT,
        "url='http://127.0.0.1:9/v1'",
        "retries=1000000",
        says=("retries", "1000000"),
    ),
    _judge(
        "a key with a new line",
        *_ENDPOINT,
        "url='http://127.0.0.1:9/v1'",
        "api_key_env=BAD_KEY",
        says=("BAD_KEY",),
        env={"BAD_KEY": "a\nb"},
    ),
    _judge(
        "a key of other letters",
        *_ENDPOINT,
        "url='http://127.0.0.1:9/v1'",
        "api_key_env=BAD_KEY",
        says=("BAD_KEY",),
        env={"BAD_KEY": "caf\u00e9\u4f60"},
    ),
    _judge(
        "a cache that is a file",
        *_ENDPOINT[:2],
        "url='http://127.0.0.1:9/v1'",
        "cache_dir=tiny.yaml",
        says=("tiny.yaml",),
    ),
    _judge("a classifier without a folder", "judge=nli", says=("nli_model",)),
    _judge("a classifier that is not there", "judge=nli", "nli_model=none", says=("none",)),
    _judge("a classifier that is a text model", "judge=nli", "nli_model=model", says=("model", "classifier")),
    _judge("a threshold of 2", "threshold=2", says=("threshold", "2")),
    _judge("a threshold that is nan", "threshold=.nan", says=("threshold", "nan")),
    _judge("documents without a summary", says=("docs.jsonl", "summary"), files={"docs.jsonl": '{"document": "x"}\n'}),
    _judge(
        "documents that are numbers",
        says=("docs.jsonl", "document"),
        files={"docs.jsonl": '{"document": 1, "summary": "x"}\n'},
    ),
    _judge("no documents", says=("docs", "no document"), files={"docs.jsonl": ""}),
    fit(
        "a judge in a recipe without an address",
        "evaluation.tasks=[{kind: hallucination, path: docs.jsonl, judge: endpoint}]",
        says=("url",),
        files=_ROWS,
    ),
]
