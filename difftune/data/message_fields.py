"""The turns of a chat as public sets write them: every field of a message is read, or refused by name.

Roles and their usual other names, content as text or as parts of text, reasoning in a field of its own, calls of tools,
and turns that are not to be learned. What nobody here can learn is an error, so that nothing of a row is lost unseen.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_call": "assistant",
    "tool_calls": "assistant",
}
"""Roles by their usual names; a tool's answer is read, and never learned."""

REASONING = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
"""Fields that hold the reasoning of a turn; templates call it by the first."""

CALLS = ("tool_calls", "function_call")
"""Fields, and in ShareGPT sets roles, that hold calls of tools."""
_KNOWN = {"role", "from", "content", "value", "weight", "train", "loss", "name", "tool_call_id", *REASONING, *CALLS}


def read_turns(turns: Any, column: str, role_key: str, content_key: str) -> list[dict[str, Any]]:
    """The turns of a chat column.

    Args:
        turns: A list of mappings.
        column: Its name, for errors.
        role_key: Where the role stands, such as ``role`` or ``from``.
        content_key: Where the text stands, such as ``content`` or ``value``.

    Returns:
        Turns with ``role`` (system, user, assistant, tool), ``content``, and where they have them
        ``reasoning_content``, ``tool_calls``, ``name``, ``tool_call_id``, and ``learned: False`` for an assistant turn
        that is not learned.

    Raises:
        ValueError: If a turn lacks its role or text, or holds what cannot be learned.
    """
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"column {column!r} must be a list of {{{role_key}, {content_key}}}, got {turns!r:.60}")
    return [_read_turn(turn, column, role_key, content_key) for turn in turns]


def _read_turn(turn: Any, column: str, role_key: str, content_key: str) -> dict[str, Any]:
    role = turn.get(role_key) if isinstance(turn, Mapping) else None
    if role not in ROLES:
        raise ValueError(
            f"a turn of {column!r} needs {role_key} (one of {', '.join(ROLES)}) and {content_key} (text), "
            f"got {turn!r:.80}"
        )
    read: dict[str, Any] = {"role": ROLES[role]}
    content = turn.get(content_key)
    if role in CALLS:
        # ShareGPT's way: the call is the text of a turn of its own.
        turn, content = {**turn, "function_call": _json(content, column)}, None
    calls = _calls(turn, column)
    if content is None and calls:
        content = ""
    read["content"] = _text_of(content, turn, column, role_key, content_key)
    given = {name: value for name, value in turn.items() if value not in (None, "", [], {})}
    reasoning = [name for name in REASONING if name in given]
    if len(reasoning) > 1 or (reasoning and not isinstance(given[reasoning[0]], str)):
        raise ValueError(f"a turn of {column!r} has {', '.join(reasoning)}: one of them, as text, can be learned")
    if reasoning and read["role"] != "assistant":
        raise ValueError(f"a {role} turn of {column!r} has {reasoning[0]}, which only an assistant turn can have")
    if reasoning and given[reasoning[0]].strip():
        read["reasoning_content"] = given[reasoning[0]]
    if calls and read["role"] != "assistant":
        raise ValueError(f"a {role} turn of {column!r} calls a tool, which only an assistant turn can do")
    if calls:
        read["tool_calls"] = calls
    # Who speaks, and which call is answered: for templates that write it.
    read |= {name: given[name] for name in ("name", "tool_call_id") if name in given}
    # A number, such as a time, says nothing that could be learned; a mark such as `masked` says that something is not.
    unknown = [name for name in given if name not in _KNOWN and isinstance(given[name], (str, list, Mapping, bool))]
    if unknown:
        raise ValueError(
            f"a turn of {column!r} has {', '.join(map(repr, unknown))}, which nothing here reads: what it says would "
            "be lost; rename it, or leave it out"
        )
    if not _is_learned(turn, column, read["role"]):
        read["learned"] = False
    return read


def _text_of(content: Any, turn: Mapping[str, Any], column: str, role_key: str, content_key: str) -> str:
    """Content as text: as it is, or the parts of it, all of which must be text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(isinstance(part, Mapping) for part in content):
        kinds = [part.get("type", "text" if "text" in part else None) for part in content]
        other = sorted({str(kind) for kind in kinds if kind not in ("text", "input_text", "output_text")})
        if other:
            raise ValueError(f"a turn of {column!r} has a part of type {', '.join(other)}: only text can be learned")
        texts = [part.get("text") for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)
    raise ValueError(
        f"a turn of {column!r} needs {role_key} (one of {', '.join(ROLES)}) and {content_key} (text), got {turn!r:.80}"
    )


def _json(content: Any, column: str) -> Any:
    """A call that stands as JSON in the text of a turn."""
    try:
        return json.loads(content) if isinstance(content, str) else content
    except ValueError as error:
        raise ValueError(
            f"a call of a tool in {column!r} must be JSON with name and arguments, got {content!r:.60}"
        ) from error


def _calls(turn: Mapping[str, Any], column: str) -> list[Any]:
    """Calls of tools, in the form that templates read: a list of {type, function: {name, arguments}}."""
    calls = turn.get("tool_calls")
    old = turn.get("function_call")
    if isinstance(old, Mapping) and old and not calls:
        calls = [{"type": "function", "function": dict(old)}]
    elif old and not calls:
        raise ValueError(f"function_call of a turn of {column!r} must hold a name and arguments, got {old!r:.60}")
    if not calls:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(f"tool_calls of a turn of {column!r} must be a list of calls, got {calls!r:.60}")
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"a call of a turn of {column!r} needs the name of a function, got {call!r:.80}")
    return [dict(call) for call in calls]


def _is_learned(turn: Mapping[str, Any], column: str, role: str) -> bool:
    """Whether an assistant turn is learned: not with ``weight: 0``, ``train: false`` or ``loss: false``."""
    learned = True
    for name in ("weight", "train", "loss"):
        value = turn.get(name)
        if value is None:
            continue
        if value not in (0, 1):
            raise ValueError(
                f"a turn of {column!r} has {name}={value!r}: a turn is learned (1, true) or not (0, false), and "
                "nothing in between"
            )
        learned = learned and bool(value)
    return learned or role != "assistant"


def needed_texts(message: Mapping[str, Any]) -> list[str]:
    """What a template must write of a turn besides its content: names of called functions, what a tool said.

    Args:
        message: A turn as :func:`read_turns` gives it.
    """
    texts = [call.get("function", call)["name"] for call in message.get("tool_calls", [])]
    if message["role"] in ("tool", "system") or (message.get("tool_calls") and message["content"].strip()):
        texts.append(message["content"].strip())
    return texts


def tool_names(tools: Sequence[Any]) -> list[str]:
    """Names of the tools that a row describes.

    Raises:
        ValueError: If one has none.
    """
    names = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"a tool of 'tools' needs a name, got {tool!r:.80}")
        names.append(function["name"])
    return names
