import pytest

from difftune.data.chat import encode_examples
from difftune.data.examples import Dropped
from difftune.data.formats import FORMATS, read_example, resolve_format
from difftune.data.tokenizers import build_tokenizer

QUESTION, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def chat(**columns):
    """Role and content of the turns that a row becomes, in the format that its columns tell."""
    found = read_example(resolve_format("auto", columns, "here"), columns, "here")
    return found if isinstance(found, Dropped) else [(turn["role"], turn["content"]) for turn in found.messages]


TOLD = [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4")]
SHARE = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]


@pytest.mark.parametrize(
    ("columns", "turns"),
    [
        ({"messages": [QUESTION, ANSWER], "system": "Be brief."}, TOLD),
        ({"conversations": SHARE, "system": "Be brief."}, TOLD),
        ({"conversations": [{"from": "system", "value": "Be brief."}, *SHARE]}, TOLD),
        ({"conversations": [QUESTION, ANSWER]}, TOLD[1:]),
        ({"conversations": SHARE, "system": None}, TOLD[1:]),
        ({"instruction": "2+2?", "input": "", "output": "4", "system": "Be brief."}, TOLD),
        ({"instruction": "Add.", "input": "2+2", "output": "4"}, [("user", "Add.\n\n2+2"), ("assistant", "4")]),
        (
            {"instruction": "Add.", "context": "2+2", "response": "4", "category": "x"},
            [("user", "Add.\n\n2+2"), ("assistant", "4")],
        ),
        ({"system_prompt": "Be brief.", "question": "2+2?", "response": "4", "id": "x"}, TOLD),
        ({"system_prompt": "", "question": "2+2?", "response": "4"}, TOLD[1:]),
        ({"prompt": [QUESTION], "completion": [ANSWER]}, TOLD[1:]),
        ({"prompt": [QUESTION], "completion": "4"}, TOLD[1:]),
        ({"prompt": "2+2?", "completion": "4", "system": "Be brief."}, TOLD),
        ({"prompt": "2+2?", "prompt_id": "x", "messages": [QUESTION, ANSWER]}, TOLD[1:]),
        ({"messages": [QUESTION, {"role": "assistant", "content": ""}]}, Dropped("empty assistant turn")),
    ],
)
def test_chats_of_public_sets_are_read_whole(columns, turns):
    assert chat(**columns) == turns


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "a", "chosen": [ANSWER], "rejected": [ANSWER]}, "'chosen' and 'rejected', a pair for preference"),
        ({"chosen": "a", "rejected": "b"}, "preference learning"),
        ({"problem": "a", "answer": "4", "generations": ["b"], "solution": "s"}, "'generations', several answers"),
        ({"messages": [QUESTION, ANSWER], "tools": "no json"}, "column 'tools' must be a list of tools, or JSON"),
        ({"messages": [QUESTION, ANSWER], "tools": {"a": 1}}, "column 'tools' must be a list"),
        ({"conversations": [{"from": "human", "value": None}]}, "needs from .* and value"),
    ],
)
def test_what_cannot_be_learned_is_refused_by_name(columns, message):
    with pytest.raises(ValueError, match=message):
        chat(**columns)


def learned(messages, template=None, tools=None):
    """The text of the documents of a chat, with what is learned in brackets."""
    tokenizer = build_tokenizer("bytes")
    if template is not None:
        tokenizer.chat_template = template
    example = read_example(FORMATS["messages"], {"messages": messages, "tools": tools}, "here")
    texts = []
    for document in encode_examples(tokenizer, [example], ["here"]):
        parts = [
            f"[{tokenizer.decode([i])}]" if is_label else tokenizer.decode([i])
            for i, is_label in zip(document.ids, document.learned, strict=True)
        ]
        texts.append("".join(parts).replace("][", ""))
    return texts


TEMPLATE = (
    "{% if tools %}T{% for t in tools %}{{ t.function.name }},{% endfor %}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }}({{ c.function.arguments }}){% endfor %}"
    "{% if m.role == 'assistant' %}<|eos|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_reasoning_and_calls_are_learned_where_the_template_writes_them():
    thought = {**ANSWER, "reasoning_content": "two and two"}
    assert learned([QUESTION, thought], TEMPLATE) == ["<|user|>2+2?<|assistant|>[<think>two and two</think>4<|eos|>]"]
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    said = {"role": "tool", "content": "4"}
    (text,) = learned([QUESTION, called, said, ANSWER], TEMPLATE, [CALL])
    assert text == ("Tadd,<|user|>2+2?<|assistant|>[CALL add({'a': 2})<|eos|>]<|tool|>4<|assistant|>[4<|eos|>]")


def test_turns_that_are_marked_are_read_and_not_learned():
    (text,) = learned([QUESTION, {**ANSWER, "weight": 0}, QUESTION, ANSWER], TEMPLATE)
    assert text == "<|user|>2+2?<|assistant|>4<|eos|><|user|>2+2?<|assistant|>[4<|eos|>]"
    with pytest.raises(
        ValueError, match="here: no label to learn, every assistant turn is marked as not to be learned"
    ):
        learned([QUESTION, {**ANSWER, "train": False}], TEMPLATE)


PLAIN = (
    "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}{% endif %}"
    "{% if m.role == 'assistant' %}<|eos|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        (
            [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER],
            None,
            "leaves out 'Be brief.' of the system turn",
        ),
        (
            [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
            None,
            "leaves out 'add' of the assistant",
        ),
        ([QUESTION, ANSWER], [CALL], "leaves out 'add' of the tool"),
        ([QUESTION, {**ANSWER, "reasoning_content": "two and two"}], None, "drops the reasoning"),
    ],
)
def test_what_a_template_leaves_out_is_refused_by_name(messages, tools, message):
    with pytest.raises(ValueError, match=f"here: .*{message}"):
        learned(messages, PLAIN, tools)
