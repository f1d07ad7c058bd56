from datetime import date

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from difftune import rendering
from difftune.data.tokenizers import build_tokenizer, tokenizer_fingerprint
from difftune.evaluation.prompts import build_prompt
from difftune.evaluation.tokens import token_rows
from difftune.rendering import chat_ids, fix_date, opening, render_chat, template_date, text_ids

CHAT = [{"role": "user", "content": "1+1"}]
DATED = "{% if not date_string is defined %}{% set date_string = strftime_now(FORMAT) %}{% endif %}\n{{ date_string }}"


def framed(single: str):
    tokenizer = build_tokenizer("bytes")
    special = [("<|bos|>", 1), ("<|eos|>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize(
    ("single", "begin"), [("$A", []), ("<|bos|> $A", [1]), ("$A <|eos|>", []), ("<|bos|> $A <|eos|>", [1])]
)
def test_a_text_begins_as_its_tokenizer_begins_one_everywhere(single: str, begin: list[int]) -> None:
    tokenizer = framed(single)
    inner = build_tokenizer("bytes")("ab")["input_ids"]
    assert opening(tokenizer) == begin
    assert text_ids(tokenizer, "ab") == token_rows(tokenizer, ["ab"], length=9, num_tokens=9)[0] == [*begin, *inner]
    # One that writes its beginning itself has it once.
    assert text_ids(tokenizer, "<|bos|>ab") == [1, *inner]
    assert build_prompt("plain", tokenizer, CHAT, [], "p")[: len(begin)] == begin
    assert build_prompt("chat", tokenizer, CHAT, [], "p") == chat_ids(tokenizer, CHAT, add_generation_prompt=True)


def test_a_template_that_writes_its_beginning_has_it_once() -> None:
    tokenizer = framed("<|bos|> $A")
    tokenizer.chat_template = f"{{{{ bos_token }}}}{tokenizer.chat_template}"
    assert chat_ids(tokenizer, CHAT).count(1) == build_prompt("chat", tokenizer, CHAT, [], "p").count(1) == 1


@pytest.mark.parametrize("format", ["%d %b %Y", "%Y-%m-%d %H:%M:%S.%f", "%A, %-d. %B; 100%% %j %p"])
def test_a_template_that_reads_the_clock_reads_one_date(format: str, tmp_path, monkeypatch, caplog) -> None:
    rendering._say_date.cache_clear()
    tokenizer = build_tokenizer("bytes", chat_template=DATED.replace("FORMAT", repr(format)))
    assert "reads the clock" in caplog.text
    today = template_date(tokenizer)
    # The newline that Jinja leaves stands where it stood.
    expected = date(today.year, today.month, today.day).strftime(format.replace("%H:%M:%S.%f", "00:00:00.000000"))
    assert render_chat(tokenizer, CHAT).replace("AM", "") == expected.replace("AM", "")
    tokens, key = chat_ids(tokenizer, CHAT), tokenizer_fingerprint(tokenizer)
    fix_date(tokenizer, "2001-02-03")
    assert chat_ids(tokenizer, CHAT) != tokens and tokenizer_fingerprint(tokenizer) != key
    tokenizer.save_pretrained(tmp_path)
    again = build_tokenizer(str(tmp_path))
    assert template_date(again) == date(2001, 2, 3) and chat_ids(again, CHAT) == chat_ids(tokenizer, CHAT)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template


def test_the_fingerprint_of_other_templates_knows_no_date() -> None:
    tokenizer = build_tokenizer("bytes")
    key = tokenizer_fingerprint(tokenizer)
    fix_date(tokenizer, "2001-02-03")
    assert tokenizer_fingerprint(tokenizer) == key and rendering.DATE_KEY not in tokenizer.init_kwargs


def test_a_chat_template_is_a_file_a_name_or_jinja(tmp_path) -> None:
    file = tmp_path / "my template"
    file.write_text("{{ 'file' }}")
    bare = build_tokenizer("bytes")
    bare.chat_template = {"other": "{{ 'other' }}", "tool_use": "{{ 'tools' }}"}
    bare.save_pretrained(tmp_path / "named")
    named = str(tmp_path / "named")
    for template, expected in ((str(file), "file"), ("tool_use", "tools"), ("{{ 'inline' }}", "inline")):
        tokenizer = build_tokenizer(named, chat_template=template)
        assert render_chat(tokenizer, CHAT) == expected
        tokenizer.save_pretrained(tmp_path / "saved")
        assert render_chat(build_tokenizer(str(tmp_path / "saved")), CHAT) == expected
    with pytest.raises(ValueError, match=r"none of them called default: set chat_template to one of other, tool_use"):
        render_chat(build_tokenizer(named), CHAT)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("nowhere.jinja", r"'nowhere.jinja' is neither a file.*own are default"),
        ("a\0b", "neither a file"),
        ("~nobody_here/x.jinja", "neither a file"),
        (".", "neither a file"),
        ("x" * 5000, "neither a file"),
        ("{% for %}", "broken, line 1"),
        ("a\n{{ b", "broken, line 2"),
        ("", "neither a file"),
    ],
)
def test_what_is_no_template_is_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)chat_template: .*{message}"):
        build_tokenizer("bytes", chat_template=template)


def test_a_broken_template_of_a_tokenizer_is_refused_where_it_is_needed() -> None:
    tokenizer = build_tokenizer("bytes")
    tokenizer.chat_template = "{{ a"
    with pytest.raises(ValueError, match="the chat template is broken, line 1"):
        render_chat(tokenizer, CHAT)


def test_a_text_that_cannot_be_encoded_is_named() -> None:
    for name, text, message in (
        ("digits", "é", "the tokenizer cannot encode it"),
        ("bytes", "caf\udce9", "half of one"),
    ):
        with pytest.raises(ValueError, match=f"the prompt: .*{message}"):
            text_ids(build_tokenizer(name), text, "the prompt")
