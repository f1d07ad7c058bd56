import pytest

from difftune.data.chat import encode_examples
from difftune.data.formats import Example
from difftune.data.tokenizers import build_tokenizer

QWEN3 = """
{%- set ns = namespace(last=-1) -%}
{%- for m in messages if m.role == 'user' -%}{%- set ns.last = ns.last + 1 -%}{%- endfor -%}
{%- set ns.seen = -1 -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{%- set ns.seen = ns.seen + 1 -%}{%- endif -%}
{%- if m.role == 'assistant' -%}
{%- set c = m.content -%}{%- set r = '' -%}
{%- if m.reasoning_content is string -%}{%- set r = m.reasoning_content -%}
{%- elif '</think>' in c -%}
{%- set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
{%- set c = c.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{- '<|assistant|>\n' -}}
{%- if ns.seen == ns.last -%}{{- '<think>\n' + r + '\n</think>\n\n' -}}{%- endif -%}
{{- c + eos_token + '\n' -}}
{%- else -%}{{- '<|' + m.role + '|>\n' + m.content + '\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}"""
# As R1's: the thought is opened for the model, and taken from every turn.
R1 = (
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
    "{{- '<|assistant|>' + m.content.split('</think>')[-1] + eos_token -}}"
    "{%- else -%}{{- '<|user|>' + m.content -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|><think>\n' -}}{%- endif -%}"
)
# Takes the thought, and does not open one.
DROPS = R1.replace("<|assistant|><think>\n", "<|assistant|>")
# Answers at once: the empty thought is in the generation prompt alone.
AT_ONCE = R1.replace("<think>\n", "<think>\n\n</think>\n\n").replace(".split('</think>')[-1]", "")
GEMMA = (
    "{{- bos_token -}}{%- if messages[0].role == 'system' -%}{{- raise_exception('System role not supported') -}}"
    "{%- endif -%}{%- for m in messages -%}{{- '<|' + m.role + '|>\n' + m.content | trim + eos_token + '\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
)
MISTRAL = (
    "{{- bos_token -}}{%- for m in messages -%}{%- if m.role == 'user' -%}{{- '[INST] ' + m.content + ' [/INST]' -}}"
    "{%- else -%}{{- ' ' + m.content + eos_token -}}{%- endif -%}{%- endfor -%}"
)
TAIL = (
    "{%- for m in messages -%}{{- '<|' + m.role + '|>' + m.content + eos_token + '[end of turn]' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
THOUGHT = "<think>\nadd\n</think>\n\n"


def learned(template: str, *contents: str, **fields: str) -> list[str]:
    """The documents of a chat, what is learned of it in double brackets."""
    tokenizer = build_tokenizer("bytes", chat_template=template)
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    messages[-1].update(fields)
    texts = []
    for document in encode_examples(tokenizer, [Example(messages)], ["line 7"]):
        text, before = "", False
        for token, is_learned in zip(document.ids.tolist(), document.learned.tolist(), strict=True):
            text += ("[[" if is_learned else "]]") if is_learned != before else ""
            text += str(tokenizer.decode([token]))
            before = is_learned
        texts.append(text + "]]")
    return texts


def test_thoughts_are_learned_in_the_rendering_that_shows_them() -> None:
    assert learned(QWEN3, "1+1", f"{THOUGHT}2", "2+2", f"{THOUGHT}4") == [
        f"<|user|>\n1+1\n<|assistant|>\n[[{THOUGHT}2<|eos|>]]",
        f"<|user|>\n1+1\n<|assistant|>\n2<|eos|>\n<|user|>\n2+2\n<|assistant|>\n[[{THOUGHT}4<|eos|>]]",
    ]
    assert learned(QWEN3, "1+1", "2", reasoning_content="add") == [
        f"<|user|>\n1+1\n<|assistant|>\n[[{THOUGHT}2<|eos|>]]"
    ]


@pytest.mark.parametrize(
    ("template", "prompt"),
    [(QWEN3, "<|user|>\n1+1\n<|assistant|>\n"), (R1, "<|user|>1+1<|assistant|>")],
)
def test_an_empty_thought_is_read_and_not_learned(template: str, prompt: str) -> None:
    assert learned(template, "1+1", "2") == [f"{prompt}<think>\n\n</think>\n\n[[2<|eos|>]]"]


def test_an_empty_thought_of_the_row_is_learned() -> None:
    kept = TAIL.replace("[end of turn]", "")
    for template, prompt in ((kept, "<|user|>1+1<|eos|><|assistant|>"), (QWEN3, "<|user|>\n1+1\n<|assistant|>\n")):
        assert learned(template, "1+1", "<think>\n\n</think>\n\n2") == [f"{prompt}[[<think>\n\n</think>\n\n2<|eos|>]]"]


def test_a_thought_that_the_template_takes_away_is_learned_behind_the_generation_prompt() -> None:
    assert learned(R1, "1+1", f"{THOUGHT}2", "2+2", f"{THOUGHT}4") == [
        "<|user|>1+1<|assistant|><think>\n[[add\n</think>\n\n2<|eos|>]]",
        "<|user|>1+1<|assistant|>\n\n2<|eos|><|user|>2+2<|assistant|><think>\n[[add\n</think>\n\n4<|eos|>]]",
    ]
    assert learned(R1, "1+1", "add\n</think>\n\n2") == [
        "<|user|>1+1<|assistant|><think>\n[[add\n</think>\n\n2<|eos|>]]"
    ]
    assert learned(DROPS, "1+1", f"{THOUGHT}2") == [f"<|user|>1+1<|assistant|>[[{THOUGHT}2<|eos|>]]"]


def test_a_prompt_that_answers_at_once_takes_answers_without_a_thought_alone() -> None:
    assert learned(AT_ONCE, "1+1", "2") == ["<|user|>1+1<|assistant|><think>\n\n</think>\n\n[[2<|eos|>]]"]
    with pytest.raises(ValueError, match=r"line 7: the chat template does not continue .* set chat_template"):
        learned(AT_ONCE, "1+1", f"{THOUGHT}2")


def test_turns_that_are_not_rewritten_are_one_document() -> None:
    assert learned(MISTRAL, "1+1", "2", "2+2", "4") == [
        "<|bos|>[INST] 1+1 [/INST][[ 2<|eos|>]][INST] 2+2 [/INST][[ 4<|eos|>]]"
    ]
    # What is trimmed is not learned, nor the line after the end.
    assert learned(GEMMA, "1+1", " 2 \n", "2+2", "4") == [
        "<|bos|><|user|>\n1+1<|eos|>\n<|assistant|>\n[[2<|eos|>]]\n<|user|>\n2+2<|eos|>\n<|assistant|>\n[[4<|eos|>]]"
    ]


def test_what_a_template_writes_after_the_end_is_not_learned() -> None:
    assert learned(TAIL, "1+1", "2", "2+2", "4") == [
        "<|user|>1+1<|eos|>[end of turn]<|assistant|>[[2<|eos|>]][end of turn]<|user|>2+2<|eos|>[end of turn]"
        "<|assistant|>[[4<|eos|>]]"
    ]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (GEMMA.replace("'system'", "'user'"), "line 7: the chat template refuses the row: System role not supported"),
        ("{{ 1 + messages[0].content }}", "line 7: the chat template fails on it: TypeError"),
        ("{{ messages[7].content.x }}", "line 7: the chat template refuses the row"),
        ("{% for m in messages %}{{ loop.index // 0 }}{% endfor %}", "line 7: .* ZeroDivisionError"),
    ],
)
def test_a_template_that_fails_names_the_row(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learned(template, "1+1", "2")
