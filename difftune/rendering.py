"""How a text and a chat become tokens: the one place that training, generation, likelihoods and probes ask.

A text begins as its tokenizer begins one (`text_ids`); a chat begins and ends as its template writes it (`chat_ids`).
A template that reads the clock (`strftime_now`) always reads the same date of a tokenizer: it is saved with it.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DATE_KEY = "chat_template_date"
"""Entry of tokenizer_config.json: the date that the chat template reads."""
_CLOCK = "strftime_now"
_DATE_FILE = Path("cache") / "chat_template_date"
# What Python's strftime knows, the padless forms of Linux included.
_DIRECTIVES = [f"%{flag}{letter}" for flag in ("-", "") for letter in "aAwdbBmyYHIpMSfzZjUWcxXGuVDFTReklsnth"]


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, what: str = "the text") -> list[int]:
    """Token ids of the beginning of a text: what the tokenizer puts before every text, if anything, once, and the text.

    What a tokenizer puts behind a text is left out: the text may go on.

    Raises:
        ValueError: If the tokenizer cannot encode the text.
    """
    ids, begin = plain_ids(tokenizer, text, what), opening(tokenizer)
    return ids if begin and ids[: len(begin)] == begin else begin + ids


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str, what: str = "the text") -> list[int]:
    """Token ids of a part of a text, or of a rendered chat: no special tokens are added.

    Raises:
        ValueError: If the tokenizer cannot encode it.
    """
    try:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    except Exception as error:  # the tokenizers library raises Exception itself
        half = next((character for character in text if "\ud800" <= character <= "\udfff"), None)
        if half is not None:
            raise ValueError(
                f"{what}: it holds {half!r}, which is no character but half of one: the text is damaged, or not UTF-8"
            ) from error
        raise ValueError(
            f"{what}: the tokenizer cannot encode it ({str(error).splitlines()[0]}): leave it out, or use a tokenizer "
            "that knows every character, such as bytes"
        ) from error


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text: its begin-of-text token, or nothing."""
    inner = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    places = range(len(whole) - len(inner) + 1)
    return whole[: next((at for at in places if whole[at : at + len(inner)] == inner), 0)]


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], what: str = "the chat", **options: Any
) -> list[int]:
    """Token ids of a chat, exactly as its template writes it; arguments as of `render_chat`."""
    return plain_ids(tokenizer, render_chat(tokenizer, messages, what, **options), what)


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], what: str = "the chat", **options: Any
) -> str:
    """The text of a chat under the tokenizer's template, special tokens included.

    Args:
        tokenizer: With a chat template.
        messages: Turns with `role` and `content`.
        what: Names the chat in errors.
        options: Of the template: `add_generation_prompt`, `tools`, ...

    Raises:
        ValueError: If there is no template, or it is broken or refuses the chat.
    """
    template = _template(tokenizer, options.get("tools"))
    if _CLOCK in template:
        template = _with_clock(template, template_date(tokenizer))
    chat: list[Any] = list(messages)
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, chat_template=template, **options)
    except TemplateSyntaxError as error:
        raise ValueError(f"the chat template is broken, line {error.lineno}: {error.message}") from error
    except TemplateError as error:
        raise ValueError(f"{what}: the chat template refuses the row: {error}") from error
    except Exception as error:  # a template can do whatever Python can
        raise ValueError(f"{what}: the chat template fails on it: {type(error).__name__}: {error}") from error
    assert isinstance(text, str)
    return text


def choose_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Give a tokenizer another chat template, which is saved with it.

    Args:
        tokenizer: Changed in place.
        template: The name of one of the tokenizer's own templates, a file, or Jinja text.

    Raises:
        ValueError: If it is none of them, or the Jinja is broken.
    """
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {} if own is None else {"default": own}
    if template in named:
        text = named[template]
    elif "{{" in template or "{%" in template:
        text = template
    elif (file := _file(template)) is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"chat_template: the file {file} cannot be read: {error}") from error
    else:
        names = f"the tokenizer's own are {', '.join(sorted(named))}" if named else "the tokenizer has none of its own"
        raise ValueError(
            f"chat_template: {template!r} is neither a file, nor Jinja text, nor the name of a template ({names})"
        )
    if not text.strip():
        raise ValueError(f"chat_template: {template!r} is empty")
    check_template(text)
    tokenizer.chat_template = text


def check_template(template: str) -> None:
    """Raise if the Jinja of a chat template is broken.

    Raises:
        ValueError: With the line and what is wrong there.
    """
    # The library's environment, for its own tags, by a rendering whose result does not matter.
    try:
        from transformers.utils.chat_template_utils import render_jinja_template

        render_jinja_template([[]], chat_template=template)
    except TemplateSyntaxError as error:
        raise ValueError(f"chat_template: it is broken, line {error.lineno}: {error.message}") from error
    except Exception:
        return  # it wants a chat


def reads_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template of the tokenizer writes the date of the day."""
    return _CLOCK in json.dumps(tokenizer.chat_template)


def template_date(tokenizer: PreTrainedTokenizerBase) -> date:
    """The date that the tokenizer's chat template reads: the one that it was saved with, else the day of first use."""
    return date.fromisoformat(tokenizer.init_kwargs.setdefault(DATE_KEY, date.today().isoformat()))


def fix_date(tokenizer: PreTrainedTokenizerBase, day: str | None = None) -> None:
    """Let a template that reads the clock read one date from now on, and say which; others are left alone.

    Args:
        tokenizer: Changed in place: the date is saved with it.
        day: ISO date. None: the one that the tokenizer was saved with, else today.
    """
    if not reads_clock(tokenizer):
        return
    if day is not None:
        tokenizer.init_kwargs[DATE_KEY] = day
    _say_date(template_date(tokenizer).isoformat())


def date_of_run(run_dir: Path) -> str | None:
    """The date that the chat template of a run reads, if the run was begun or prepared before.

    Raises:
        ValueError: If what is written there is no date.
    """
    saved, prepared = run_dir / "tokenizer" / "tokenizer_config.json", run_dir / _DATE_FILE
    day = None
    try:
        day = json.loads(saved.read_text(encoding="utf-8")).get(DATE_KEY) if saved.is_file() else None
        day = day or (prepared.read_text(encoding="utf-8").strip() if prepared.is_file() else None)
        return day and date.fromisoformat(day).isoformat()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the date of the chat template of the run {run_dir} cannot be read ({error}): correct {DATE_KEY} in "
            f"{saved}, or remove {prepared}"
        ) from error


def keep_date(tokenizer: PreTrainedTokenizerBase, run_dir: Path) -> None:
    """Let all processes of a run, and all that come later, read the date of the first one."""
    if not reads_clock(tokenizer) or date_of_run(run_dir) is not None:
        return
    file = run_dir / _DATE_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    own = file.with_name(f"{file.name}.{os.getpid()}")
    own.write_text(template_date(tokenizer).isoformat() + "\n", encoding="utf-8")
    try:
        # Whole at once, and only the first one.
        os.link(own, file)
    except FileExistsError:
        fix_date(tokenizer, date_of_run(run_dir))
    except OSError:  # a file system without links
        os.replace(own, file)
    finally:
        own.unlink(missing_ok=True)


@cache
def _say_date(day: str) -> None:
    log.warning(
        "the chat template reads the clock: it reads %s in all of this run, and wherever the tokenizer that is saved "
        "with the model is used",
        day,
    )


def _file(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long, with a NUL, of a user who is not there
        return None


def _template(tokenizer: PreTrainedTokenizerBase, tools: Any) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        name = "tool_use" if tools and "tool_use" in template else "default"
        if name not in template:
            raise ValueError(
                f"the tokenizer has several chat templates, none of them called default: set chat_template to one of "
                f"{', '.join(sorted(template))}"
            )
        template = template[name]
    if template is None:
        raise ValueError(
            "the tokenizer has no chat template, which chats and problems need: set chat_template to a file, or put a "
            "chat_template.jinja into the tokenizer's folder"
        )
    return template


@cache
def _with_clock(template: str, day: date) -> str:
    """The template with a clock of its own, so that the same text is rendered by every version of transformers."""
    midnight = datetime(day.year, day.month, day.day)
    replaced = "".join(
        f"|replace({directive!r},{value!r})"
        for directive in _DIRECTIVES
        if (value := midnight.strftime(directive)) and value != directive
    )
    # An expression stands last: a newline behind a block would be trimmed.
    macro = f"{{%- macro {_CLOCK}(format) -%}}{{{{ (format|replace('%%','\0')){replaced}|replace('\0','%') }}}}"
    return f"{macro}{{%- endmacro -%}}{{{{- '' }}}}{template}"
