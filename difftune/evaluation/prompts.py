r"""How a problem is put to a model, by name.

* ``chat``: the problem's own turns in the tokenizer's chat template, as in training.
* ``boxed``: the same, the question led by the words that OpenThoughts-114k-math has before every problem.
* ``cot``: the same, the question followed by the words that Qwen2.5-Math is asked with.
* ``plain``: ``Question: ...`` and ``Answer:`` without a chat template, for models that have learned none.

Demonstrations come before the problem: as turns of the chat, or one below the other.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from difftune.rendering import chat_ids, text_ids

PROMPTS = ("chat", "boxed", "cot", "plain")
_AROUND = {
    "chat": ("", ""),
    "boxed": (r"Return your final response within \boxed{}. ", ""),
    "cot": ("", "\n" r"Please reason step by step, and put your final answer within \boxed{}."),
}
_STOPS = {"plain": ["\nQuestion:"]}


def stop_strings(prompt: str) -> list[str]:
    """What ends an answer besides the end-of-text token."""
    return _STOPS.get(prompt, [])


def build_prompt(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Any],
    demonstrations: Sequence[tuple[str, str]],
    what: str,
) -> list[int]:
    """Token ids up to the point where the model answers.

    Args:
        prompt: One of `PROMPTS`.
        tokenizer: Of the model.
        messages: The chat before the answer: mappings with `role` and `content`, the last one the question.
        demonstrations: Questions and answers that come before it.
        what: Names the problem in errors.

    Raises:
        ValueError: If the tokenizer has no chat template where one is needed, or cannot encode the prompt.
    """
    if prompt == "plain":
        pairs = [*demonstrations, (messages[-1]["content"], "")]
        text = "\n\n".join(f"Question: {question}\nAnswer: {answer}".rstrip() for question, answer in pairs)
        return text_ids(tokenizer, text, what)
    return _chat_ids(prompt, tokenizer, messages, demonstrations, what)


def _chat_ids(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Any],
    demonstrations: Sequence[tuple[str, str]],
    what: str,
) -> list[int]:
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template, which problems need: set chat_template (--chat-template FILE), put a "
            "chat_template.jinja into its folder, or set prompt=plain"
        )
    before, after = _AROUND[prompt]
    *earlier, last = messages
    turns = [*earlier]
    for question, answer in demonstrations:
        turns += [
            {"role": "user", "content": f"{before}{question}{after}"},
            {"role": "assistant", "content": answer},
        ]
    turns.append({**last, "content": f"{before}{last['content']}{after}"})
    return chat_ids(tokenizer, turns, what, add_generation_prompt=True)
