"""What is learned of a chat: each assistant turn, as the template shows it when it is the last.

Generation begins where the template's generation prompt ends, so that is where the labels of a turn begin. Three kinds
of template need more than the difference of the two renderings:

* Some rewrite earlier turns (they drop the reasoning of all but the last): the chat becomes several documents, and
  each turn is learned in the one in which it is the last.
* Some open a thought in the generation prompt and take it from the finished turn, or drop every thought: the
  document is the generation prompt, what the row has the model write after it, and the template's end of the turn.
* Some write an empty thought before an answer without one: it is read, and not learned. (One of the row itself is.)
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from difftune.data.message_fields import needed_texts, tool_names
from difftune.rendering import render_chat

log = logging.getLogger(__name__)

_TAG = r"(?:think|thinking|thought|reasoning|seed:think)"
_OPEN = rf"(?:<{_TAG}>|\[THINK\])"
_CLOSE = rf"(?:</{_TAG}>|\[/THINK\])"
_THOUGHT = re.compile(rf"\s*{_OPEN}?(.*?){_CLOSE}\s*(.*)", re.DOTALL)
_EMPTY = re.compile(rf"\s*{_OPEN}\s*{_CLOSE}\s*")
_OPENED = re.compile(rf"{_OPEN}\s*\Z")
_PLACE = "\u2063answer\u2063"


@dataclass(frozen=True)
class Rendered:
    """The text of a document, and which parts of it are learned."""

    text: str
    """Up to the end of the last turn that is learned; without its end-of-text token if the template writes none."""
    learned: list[tuple[int, int]]
    """Characters: where what is learned of each turn begins and ends. Empty: all of a text without turns."""
    turn: int | None
    """Place in the chat of the last turn that is learned."""

    def borders(self) -> list[str]:
        """The text up to each beginning and each end."""
        return [self.text[:at] for span in self.learned for at in span]


def render_turns(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    where: str,
    tools: Sequence[Any] | None = None,
) -> list[Rendered]:
    """The documents of a chat: one, or several where the template rewrites earlier turns.

    Args:
        tokenizer: With a chat template.
        messages: Turns with `role` and `content`; assistant turns with `learned` False are read and not learned.
        where: Names the row in errors.
        tools: Descriptions of the tools that the chat may call, for the template.

    Raises:
        ValueError: If there is no assistant turn to learn, the template is not one that can be learned, or it leaves
            out something of the chat.
    """
    assistant = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    turns = [place for place in assistant if messages[place].get("learned", True)]
    if not turns:
        none = "every assistant turn is marked as not to be learned" if assistant else "the row has no assistant turn"
        raise ValueError(f"{where}: no label to learn, {none}")
    messages = [{name: value for name, value in message.items() if name != "learned"} for message in messages]
    options: dict[str, Any] = {"tools": list(tools)} if tools else {}
    if assistant[0] == 0:
        raise ValueError(f"{where}: the row begins with an assistant turn, which nothing asks for")
    documents: list[Rendered] = []
    for place in turns:
        turn = _render_turn(tokenizer, messages, place, where, options)
        before = documents[-1] if documents else None
        if before is not None and turn.text.startswith(before.text) and turn.learned[0][0] >= len(before.text):
            documents[-1] = replace(turn, learned=[*before.learned, *turn.learned])
        else:
            documents.append(turn)
    if len(documents) > 1:
        _say_rewrites()
    return documents


def _render_turn(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    place: int,
    where: str,
    options: dict[str, Any],
) -> Rendered:
    """A chat up to an assistant turn, which alone is learned."""
    message = messages[place]
    prompt = render_chat(tokenizer, messages[:place], where, add_generation_prompt=True, **options)
    whole = render_chat(tokenizer, messages[: place + 1], where, **options)
    _require_all(messages[: place + 1], options.get("tools", ()), whole, where)
    thought = _thought_of(message)
    continues = whole.startswith(prompt)
    if not continues or (thought and thought not in whole[len(prompt) :]):
        whole = (
            prompt
            + _written_after(prompt, message, thought, whole, where)
            + _ending(tokenizer, messages, place, where, options)
        )
    start = len(prompt)
    opened = _OPENED.search(prompt)
    empty = _EMPTY.match(whole, opened.start() if opened else start)
    # One that the row itself has is as much an answer as all else that it says.
    if empty and empty.end() > start and not _EMPTY.match(message.get("content") or ""):
        start = empty.end()
        _say_empty()
    end = _end(tokenizer, whole, start, lambda: _ending(tokenizer, messages, place, where, options))
    return Rendered(whole[:end], [(start, end)], place)


def _thought_of(message: Mapping[str, Any]) -> str:
    """The reasoning of a turn, of whichever field, or "" if it has none."""
    for name in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(message.get(name), str) and message[name].strip():
            return message[name].strip()
    found = _THOUGHT.fullmatch(message.get("content") or "")
    return found[1].strip() if found else ""


def _written_after(prompt: str, message: Mapping[str, Any], thought: str, whole: str, where: str) -> str:
    """What the model has to write after a prompt that the finished turn does not continue, or without its thought."""
    content = message.get("content") or ""
    found = _THOUGHT.fullmatch(content)
    answer = found[2] if found else content
    closed = re.search(rf"{_OPEN}\s*{_CLOSE}\s*\Z", prompt)
    if opened := _OPENED.search(prompt):
        tag = opened[0].strip()
        close = f"{tag[0]}/{tag[1:]}"
        line = "" if opened[0].endswith("\n") else "\n"
        # Without a thought: the empty one, closed, which is not learned.
        return f"{line}{thought}\n{close}\n\n{answer}"
    if closed and not thought:
        return answer
    if thought and found and not closed and whole.startswith(prompt):
        return content
    raise ValueError(
        f"{where}: the chat template does not continue its own generation prompt, or drops the reasoning, so what is "
        f"learned cannot be told: it writes {prompt[-60:]!r} to ask for an answer, and "
        f"{whole[: len(prompt) + 20][-80:]!r} with one: set chat_template to one that keeps the turn as it is"
    )


def _require_all(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], text: str, where: str) -> None:
    """Raise if the template left out a system turn, a tool, a call of one or what it said: it would be lost unseen."""
    needed = [(f"the {message['role']} turn", one) for message in messages for one in needed_texts(message)]
    needed += [("the tool", name) for name in tool_names(tools)]
    for what, one in needed:
        if one not in text:
            raise ValueError(
                f"{where}: the chat template leaves out {one[:60]!r} of {what}: set chat_template to one that writes "
                "it, or remove it from the row"
            )


def _ending(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    place: int,
    where: str,
    options: dict[str, Any],
) -> str:
    """What the template writes after the content of an assistant turn."""
    chat = [*messages[:place], {"role": "assistant", "content": _PLACE}]
    text = render_chat(tokenizer, chat, where, **options)
    _, found, after = text.rpartition(_PLACE)
    if not found:
        raise ValueError(
            f"{where}: the chat template does not write the answer {_PLACE!r} as it is, so the end of a turn is not "
            "known: set chat_template to one that keeps the turn as it is"
        )
    return after


def _end(tokenizer: PreTrainedTokenizerBase, whole: str, start: int, ending: Any) -> int:
    """Where a turn ends: behind its end-of-text token, or where the template ends."""
    eos = str(tokenizer.eos_token)
    last = whole.rfind(eos, start)
    if last < 0:
        return len(whole)
    if not whole[last + len(eos) :].strip():
        return last + len(eos)
    # Something follows it: it ends the turn if the template wrote it, and is a part of the answer otherwise.
    after = ending()
    if eos not in after or not whole.endswith(after):
        return len(whole)
    return len(whole) - len(after) + after.index(eos) + len(eos)


@cache
def _say_rewrites() -> None:
    log.warning(
        "the chat template rewrites earlier turns (most drop the reasoning of all but the last): chats of several "
        "turns become several documents, and each turn is learned as it was when it was the last"
    )


@cache
def _say_empty() -> None:
    log.warning(
        "the chat template writes an empty thought before answers without reasoning: it is read and not learned; for a "
        "model that answers at once, set chat_template to one whose generation prompt writes it, or none"
    )
