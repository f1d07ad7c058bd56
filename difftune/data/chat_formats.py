"""Rows that are chats: turns in the forms of public sets, instructions, and reasoning traces."""

import json
import re
from dataclasses import replace

from difftune.data.examples import Columns, Dropped, Example, Message, question_and_target, row_id, text_of
from difftune.data.message_fields import read_turns


def reasoning_text(reasoning: str, solution: str) -> str:
    """The one form in which a reasoning trace is learned: the trace between think tags, then the solution."""
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{solution.strip()}"


def normalise_trace(text: str) -> str | None:
    """A reasoning trace in the form of `reasoning_text`, whichever delimiters it came with.

    Known are OpenThoughts' ``<|begin_of_thought|>`` family and ``<think>`` tags, whose opening tag may be
    missing (R1's chat template writes it into the prompt).

    Returns:
        None if there is no complete trace followed by a solution.
    """
    patterns = (
        r"\s*<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>\s*"
        r"<\|begin_of_solution\|>(.*?)<\|end_of_solution\|>\s*",
        r"\s*(?:<think>)?(.*?)</think>(.*)",
    )
    for pattern in patterns:
        if match := re.fullmatch(pattern, text, re.DOTALL):
            reasoning, solution = match[1].strip(), match[2].strip()
            return reasoning_text(reasoning, solution) if reasoning and solution else None
    return None


def read_messages(columns: Columns) -> Example | Dropped:
    """`messages`: turns of role and content; every assistant turn is learned."""
    return _chat(columns, _turns(columns, "messages", "role", "content"))


def read_conversations(columns: Columns) -> Example | Dropped:
    """`conversations`: turns of `from` and `value` (ShareGPT) or of role and content, and perhaps a `system` column."""
    turns = columns.get("conversations")
    if "<|begin_of_thought|>" in str(turns):
        return read_openthoughts(columns)
    keys = ("role", "content") if isinstance(turns, list) and turns and "role" in turns[0] else ("from", "value")
    return _chat(columns, _turns(columns, "conversations", *keys))


def _chat(columns: Columns, messages: list[Message]) -> Example | Dropped:
    """A chat with the tools of its row; an assistant turn must say or call something."""
    said = ("content", "reasoning_content")
    for turn in messages:
        if (
            turn["role"] == "assistant"
            and not turn.get("tool_calls")
            and not any(turn.get(n, "").strip() for n in said)
        ):
            return Dropped("empty assistant turn")
    tools = columns.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"column 'tools' must be a list of tools, or JSON of one: {error}") from error
    if tools and not isinstance(tools, list):
        raise ValueError(f"column 'tools' must be a list of tools, got {tools!r:.60}")
    return Example(messages, id=row_id(columns), tools=tools or None)


def read_alpaca(columns: Columns) -> Example | Dropped:
    """`instruction`, `output`, and perhaps `input` (or Dolly's `context` and `response`) and `system`."""
    asked = text_of(columns, "instruction").strip()
    more = next((text_of(columns, name).strip() for name in ("input", "context") if columns.get(name)), "")
    target = "output" if "output" in columns else "response"
    found = question_and_target(
        {**columns, "instruction": f"{asked}\n\n{more}" if more else asked}, "instruction", text_of(columns, target)
    )
    return _with_system(found, columns)


def read_openorca(columns: Columns) -> Example | Dropped:
    """`system_prompt`, `question`, `response`: OpenOrca."""
    found = question_and_target(columns, "question", text_of(columns, "response"))
    return _with_system(found, {"system": columns.get("system_prompt")})


def _with_system(found: Example | Dropped, columns: Columns) -> Example | Dropped:
    system = columns.get("system")
    if isinstance(found, Dropped) or not isinstance(system, str) or not system.strip():
        return found
    return replace(found, messages=[{"role": "system", "content": system.strip()}, *found.messages])


def read_preferences(columns: Columns) -> Example | Dropped:
    """`chosen` and `rejected`: pairs for preference learning, which is not there."""
    raise ValueError(
        "the row has 'chosen' and 'rejected', a pair for preference learning, which difftune does not do: to learn the "
        "chosen answers, write them into rows of messages"
    )


def read_generations(columns: Columns) -> Example | Dropped:
    """`generations`: several answers to one problem, of which the row does not say which one is to be learned."""
    raise ValueError(
        "the row has 'generations', several answers to one problem, and no 'messages' with one of them: choose one "
        "answer a row and write it into messages, or into a column solution beside problem and answer"
    )


def read_prompt_completion(columns: Columns) -> Example | Dropped:
    """`prompt` and `completion`: one user turn, one assistant turn; or both as lists of turns."""
    if isinstance(columns.get("prompt"), list) or isinstance(columns.get("completion"), list):
        parts = [
            [{"role": role, "content": text_of(columns, name)}] if isinstance(columns[name], str) else columns[name]
            for name, role in (("prompt", "user"), ("completion", "assistant"))
        ]
        turns = [
            read_turns(part, name, "role", "content")
            for part, name in zip(parts, ("prompt", "completion"), strict=True)
        ]
        # What the prompt has the assistant say is read, and not learned.
        earlier = [{**turn, "learned": False} if turn["role"] == "assistant" else turn for turn in turns[0]]
        return _chat(columns, earlier + turns[1])
    return _with_system(question_and_target(columns, "prompt", text_of(columns, "completion")), columns)


def read_openthoughts(columns: Columns) -> Example | Dropped:
    r"""`conversations` (and `correct`) of OpenThoughts-114k and open-r1/OpenThoughts-114k-math: the R1 trace.

    The reference solution of the -math set stands in `solution` and in `messages` and is *not* the target:
    `messages` is used only if it is all there is and holds a trace. Rows whose R1 answer was not verified as
    correct are dropped. The `system` column is left out, because it asks for delimiters that
    `normalise_trace` replaces.
    """
    if "correct" in columns and columns["correct"] is not True:
        return Dropped("answer not verified as correct")
    if columns.get("conversations"):
        turns = _turns(columns, "conversations", "from", "value")
    else:
        turns = _turns(columns, "messages", "role", "content")
    messages = []
    for turn in turns:
        if turn["role"] == "assistant":
            trace = normalise_trace(turn["content"])
            if trace is None:
                return Dropped("no complete reasoning trace")
            turn = {**turn, "content": trace}
        if turn["role"] != "system":
            messages.append(turn)
    return Example(messages, id=row_id(columns))


def read_openthoughts_metadata(columns: Columns) -> Example | Dropped:
    """`problem`, `deepseek_reasoning`, `deepseek_solution`: configuration "metadata" of OpenThoughts-114k."""
    reasoning, solution = text_of(columns, "deepseek_reasoning"), text_of(columns, "deepseek_solution")
    if not reasoning.strip() or not solution.strip():
        return Dropped("no complete reasoning trace")
    return question_and_target(columns, "problem", reasoning_text(reasoning, solution))


def _turns(columns: Columns, name: str, role_key: str, content_key: str) -> list[Message]:
    """The turns of a chat column, the `system` column of the row before them."""
    if name not in columns:
        raise ValueError(f"no column {name!r}; there are {', '.join(sorted(columns))}")
    messages = read_turns(columns[name], name, role_key, content_key)
    system = columns.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages
