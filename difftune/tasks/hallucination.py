"""Keys of the kind `hallucination`: summaries and answers, and a judge of them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from difftune.config.field import key, required
from difftune.tasks.base import Defaults, TaskConfig

if TYPE_CHECKING:
    from difftune.evaluation.hallucination import HallucinationTask, SourceText

_DOCUMENT = ("document", "article", "context", "text")
_QUESTION = ("question", "input", "query")
_GOLD = ("summary", "highlights", "answers", "answer", "output")


def _why_no_address(url: str) -> str | None:
    """Why a text is no address of an endpoint; None if it is one."""
    if any(character.isspace() or not character.isprintable() for character in url):
        return "has a blank or a character that cannot be seen"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return f"is no address ({error})"
    if parts.scheme not in ("http", "https"):
        return "does not begin with http:// or https://"
    return None if host else "names no host"


@dataclass(kw_only=True)
class HallucinationTaskConfig(TaskConfig):
    """Whether summaries and answers say only what the document says."""

    kind: str = "hallucination"
    """Summaries and answers, judged against their document."""
    path: str = required(is_path=True)
    """A data file, folder or hub id with columns `document` (or article, context), `summary` (or highlights), or for
    questions `question` (or input) and `answers` (a list, or one `answer`): XSum, CNN/DM, Multi-News, LongBench."""
    split: str = "test"
    """Split of a hub data set or a folder."""
    hub_name: str | None = None
    """Configuration of a hub data set. null: its default."""
    limit: int | None = key(100, low=1)
    """At most this many documents, the first ones; the paper has 100. null: all."""
    max_new_tokens: int | None = key(None, low=1)
    """Longest text in tokens. null: `evaluation.max_new_tokens`."""
    judge: str = key("span_support", choices=("span_support", "nli", "endpoint"))
    """`endpoint`: a model behind an OpenAI-compatible endpoint, as in the paper. Without a network, `nli`: whether a
    local classifier finds every sentence entailed by the document; `span_support`: no judge, but a count of the words
    that stand in the document, for following one model, not for comparisons."""
    threshold: float = key(0.8, low=0, high=1)
    """Of `span_support`: share of words that must stand in the document."""
    nli_model: str | None = key(None, is_path=True)
    """Of `nli`: folder or hub id of a classifier of natural language inference, such as roberta-large-mnli; one of its
    labels must be called entailment."""
    url: str | None = None
    """Of the endpoint, with its version: https://api.openai.com/v1, http://localhost:8000/v1."""
    judge_model: str = "gpt-4o-2024-05-13"
    """Name of the model at the endpoint; the default is that of the paper's protocol."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key, sent if it is set."""
    retries: int = key(5, low=0, most=100)
    """Attempts after the first, with waits of 1, 2, 4, ... seconds."""
    cache_dir: str | None = key(None, is_path=True)
    """Folder for what the judge answered and what could not be judged yet. null: `difftune/judge` in the user cache."""

    operand: ClassVar[str | None] = "path"

    def task_name(self) -> str:
        """Its own name, else the last part of the path without the ending."""
        return self.name or Path(self.path).stem

    def problems(self, defaults: Defaults) -> list[str]:
        """A judge must be somewhere."""
        if self.judge == "nli" and not self.nli_model:
            return ["nli_model: judge=nli needs the folder of a classifier of natural language inference"]
        if self.judge == "endpoint" and not self.url:
            return ["url: judge=endpoint needs its address, such as http://localhost:8000/v1"]
        if self.judge == "endpoint" and (reason := _why_no_address(str(self.url))):
            return [f"url: {self.url!r} {reason}; an address looks like http://localhost:8000/v1"]
        key = os.environ.get(self.api_key_env) if self.judge == "endpoint" else None
        if key is not None and not (key.isascii() and key.isprintable()):
            # Its text stays out of the message.
            return [f"api_key_env: the key in {self.api_key_env} has characters that no header can send; set it again"]
        return []

    def build(self, defaults: Defaults) -> "HallucinationTask":
        """The task with its documents and its judge."""
        from difftune.evaluation.entailment import load_entailment_judge
        from difftune.evaluation.hallucination import HallucinationTask
        from difftune.evaluation.judges import EndpointJudge
        from difftune.evaluation.span_support import SpanSupportJudge

        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "difftune" / "judge"
        cache = Path(self.cache_dir) if self.cache_dir else home
        judge: Any = SpanSupportJudge(self.threshold)
        if self.judge == "nli":
            assert self.nli_model is not None, "checked with the config"
            judge = load_entailment_judge(self.nli_model)
        if self.judge == "endpoint":
            assert self.url is not None, "checked with the config"
            secret = os.environ.get(self.api_key_env)
            judge = EndpointJudge(self.url, self.judge_model, secret, cache / "judgements.jsonl", self.retries)
        return HallucinationTask(
            self.task_name(),
            self._sources(),
            judge,
            max_new_tokens=self.max_new_tokens or defaults.max_new_tokens,
            batch_size=defaults.batch_size,
            cache=cache / "texts.jsonl" if self.judge == "endpoint" else None,
        )

    def _sources(self) -> "list[SourceText]":
        from difftune.data.sources import Source, read_rows
        from difftune.evaluation.hallucination import SourceText

        sources = []
        for number, row in enumerate(
            read_rows(Source(self.path, split=self.split, name=self.hub_name, limit=self.limit))
        ):
            columns = row.columns
            document, gold = (next((columns[n] for n in names if columns.get(n)), None) for names in (_DOCUMENT, _GOLD))
            if not isinstance(document, str) or not isinstance(gold, str | list):
                raise ValueError(
                    f"{row.where}: needs a text in one of {', '.join(_DOCUMENT)} and a reference in one of "
                    f"{', '.join(_GOLD)}; it has {', '.join(sorted(columns))}"
                )
            question = next((str(columns[name]) for name in _QUESTION if columns.get(name)), None)
            answers = [gold] if isinstance(gold, str) else [str(one) for one in gold]
            sources.append(SourceText(str(columns.get("id", columns.get("_id", number))), document, question, answers))
        return sources
