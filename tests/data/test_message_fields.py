import pytest

from difftune.data.message_fields import REASONING, needed_texts, read_turns, tool_names


def read(*turns, keys=("role", "content")):
    return read_turns(list(turns), "messages", *keys)


ASKED = {"role": "user", "content": "2+2?"}
CALL = {"id": "a", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}


@pytest.mark.parametrize("name", REASONING)
def test_reasoning_is_kept_under_the_name_that_templates_read(name):
    assert read(ASKED, {"role": "assistant", "content": "4", name: "two and two"})[1] == {
        "role": "assistant",
        "content": "4",
        "reasoning_content": "two and two",
    }
    for empty in (None, "", "  "):
        assert "reasoning_content" not in read(ASKED, {"role": "assistant", "content": "4", name: empty})[1]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "user", "content": "x", "reasoning": "y"}, "user turn of 'messages' has reasoning"),
        (
            {"role": "assistant", "content": "x", "reasoning": "y", "thinking": "z"},
            "has reasoning, thinking: one of them",
        ),
        ({"role": "assistant", "content": "x", "reasoning_content": ["y"]}, "as text, can be learned"),
        ({"role": "assistant", "content": "x", "annotations": ["y"]}, "has 'annotations', which nothing here reads"),
        ({"role": "assistant", "content": "x", "audio": {"id": 1}}, "has 'audio'"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "user turn of 'messages' calls a tool"),
        ({"role": "assistant", "content": None}, "needs role .* and content"),
        ({"role": "assistant", "content": []}, "needs role .* and content"),
        ({"role": "assistant", "content": [{"type": "text", "text": None}]}, "needs role .* and content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}, "a part of type image_url"),
        ({"role": "narrator", "content": "x"}, "needs role"),
        ({"content": "x"}, "needs role"),
        ("hello", "needs role"),
        ({"role": "assistant", "content": "x", "weight": 0.5}, "weight=0.5: a turn is learned"),
        ({"role": "assistant", "content": "x", "weight": -1}, "weight=-1"),
        ({"role": "assistant", "content": "x", "train": "no"}, "train='no'"),
        ({"role": "assistant", "content": "", "tool_calls": "add(2, 2)"}, "tool_calls .* must be a list"),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}, "needs the name of a function"),
        ({"role": "assistant", "content": "", "function_call": "add"}, "function_call .* must hold a name"),
        ({"role": "function_call", "content": "add(2)"}, "must be JSON with name and arguments"),
        ({"role": "assistant", "content": "x", "masked": True}, "has 'masked', which nothing here reads"),
    ],
)
def test_what_cannot_be_learned_is_refused_by_name(turn, message):
    with pytest.raises(ValueError, match=message):
        read(ASKED, turn)


@pytest.mark.parametrize("turns", [None, [], "hello", {}])
def test_a_column_without_turns_is_refused(turns):
    with pytest.raises(ValueError, match=r"must be a list of \{role, content\}"):
        read_turns(turns, "messages", "role", "content")


@pytest.mark.parametrize(("field", "value"), [("weight", 0), ("weight", 0.0), ("train", False), ("loss", False)])
def test_a_turn_can_be_read_and_not_learned(field, value):
    assert read(ASKED, {"role": "assistant", "content": "4", field: value})[1]["learned"] is False
    assert "learned" not in read(ASKED, {"role": "assistant", "content": "4", field: True})[1]
    # Of a turn that is never learned it says nothing new.
    assert "learned" not in read({**ASKED, field: value})[0]


def test_calls_and_what_tools_said_are_kept():
    old = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}}
    said = {"role": "tool", "content": "4", "tool_call_id": "a", "name": "add"}
    new = {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "b"}]}
    turns = read(ASKED, new, said, old)
    assert turns[1] == {"role": "assistant", "content": "", "tool_calls": [CALL, {**CALL, "id": "b"}]}
    assert turns[2] == {"role": "tool", "content": "4", "name": "add", "tool_call_id": "a"}
    assert turns[3]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]
    assert needed_texts(turns[1]) == ["add", "add"] and needed_texts(turns[2]) == ["4"]
    assert needed_texts({"role": "system", "content": " Be brief. "}) == ["Be brief."]
    assert tool_names([{"type": "function", "function": {"name": "add"}}, {"name": "sub"}]) == ["add", "sub"]
    with pytest.raises(ValueError, match="a tool of 'tools' needs a name"):
        tool_names(["add"])


def test_a_call_in_a_turn_of_its_own_is_a_call_of_the_assistant():
    call = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'}
    assert read({"from": "human", "value": "q"}, call, keys=("from", "value"))[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
    }


def test_a_name_is_kept_for_templates_that_write_it_and_a_time_is_not_text():
    turn = {"role": "user", "content": "q", "name": "Ann", "created": 1700000000, "seen": None}
    assert read(turn)[0] == {"role": "user", "content": "q", "name": "Ann"}


def test_roles_and_parts_are_read_by_their_usual_names():
    turns = read(
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a"},
        {"from": "observation", "value": "o"},
        keys=("from", "value"),
    )
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "tool"]
    parts = [{"type": "text", "text": "two"}, {"text": " and two"}]
    assert read({"role": "developer", "content": parts})[0] == {"role": "system", "content": "two and two"}
