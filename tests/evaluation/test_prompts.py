import pytest

from difftune.data.tokenizers import build_tokenizer
from difftune.evaluation.prompts import PROMPTS, build_prompt, stop_strings

TOKENIZER = build_tokenizer("bytes")
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]


def text(prompt: str, shots: list[tuple[str, str]] | None = None) -> str:
    return str(TOKENIZER.decode(build_prompt(prompt, TOKENIZER, MESSAGES, shots or [], "problem a")))


def test_each_name_is_its_words() -> None:
    assert text("chat") == "<|system|>Be brief.<|user|>1+1?<|assistant|>"
    assert text("boxed") == r"<|system|>Be brief.<|user|>Return your final response within \boxed{}. 1+1?<|assistant|>"
    assert text("cot").endswith(
        "<|user|>1+1?\nPlease reason step by step, and put your final answer within \\boxed{}.<|assistant|>"
    )
    assert text("plain") == "Question: 1+1?\nAnswer:"
    assert {prompt: stop_strings(prompt) for prompt in PROMPTS}["plain"] == ["\nQuestion:"]


def test_demonstrations_come_before_the_problem_in_the_same_words() -> None:
    shots = [("2+2?", "#### 4")]
    assert text("chat", shots) == "<|system|>Be brief.<|user|>2+2?<|assistant|>#### 4<|eos|><|user|>1+1?<|assistant|>"
    assert text("plain", shots) == "Question: 2+2?\nAnswer: #### 4\n\nQuestion: 1+1?\nAnswer:"
    assert text("boxed", shots).count(r"\boxed{}") == 2


def test_without_a_chat_template_only_plain_works() -> None:
    bare = build_tokenizer("bytes")
    bare.chat_template = None
    assert build_prompt("plain", bare, MESSAGES, [], "problem a")
    with pytest.raises(ValueError, match=r"no chat template.*or set prompt=plain"):
        build_prompt("chat", bare, MESSAGES, [], "problem a")
