"""Prompts for multi-needle retrieval: a long text, facts hidden in it, and a question about some of them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from difftune.rendering import opening, plain_ids, render_chat, text_ids

_NAMES = """
Accra Adelaide Algiers Amman Antwerp Athens Baku Bangkok Bergen Berlin Bilbao Bogota Boston Brisbane Bristol
Cairo Calgary Caracas Chennai Chicago Cologne Dakar Dallas Denver Dublin Durban Geneva Glasgow Hanoi Havana
Helsinki Houston Istanbul Jakarta Kampala Karachi Kyoto Lagos Leipzig Lima Lisbon London Lyon Madrid Manila
Melbourne Milan Montreal Mumbai Munich Nairobi Naples Osaka Oslo Ottawa Paris Perth Porto Prague Quito Riga Rome
Santiago Seattle Seoul Seville Shanghai Sofia Stockholm Sydney Taipei Tallinn Tehran Tokyo Toronto Tunis Turin
Utrecht Valencia Vienna Vilnius Warsaw Wellington Zagreb Zurich
"""
CITIES = _NAMES.split()
"""Names for needles, all different, none the beginning of another."""

PROMPTS = ("plain", "chat", "completion")
_NEEDLE = "\nThe special magic {city} number is: {number}\n"
_INSTRUCTION = "Don't give information outside the document."
_CONTEXT = "\x02"
_DIGITS = 7


@dataclass(frozen=True)
class Needles:
    """What is hidden, and what of it is asked for."""

    numbers: dict[str, str]
    """Number by city, in the order in which they were drawn; the queried ones come first."""
    queried: list[str]
    """The cities that are asked for."""


def draw_needles(draw: random.Random, needles: int, queries: int) -> Needles:
    """Different cities with different seven-digit numbers, the first of which are asked for."""
    cities = draw.sample(CITIES, needles)
    numbers = draw.sample(range(10 ** (_DIGITS - 1), 10**_DIGITS), needles)
    return Needles(dict(zip(cities, map(str, numbers), strict=True)), cities[:queries])


def question(cities: Sequence[str]) -> str:
    """The question for the numbers of some cities."""
    if len(cities) == 1:
        return f"What is the special magic number for {cities[0]}?"
    listed = f"{', '.join(cities[:-1])}{',' if len(cities) > 2 else ''} and {cities[-1]}"
    return f"What are the special magic numbers for {listed}?"


class Haystack:
    """A long text as tokens, from which prompts are made.

    Args:
        texts: The text, in parts that are joined by blank lines.
        tokenizer: Of the model.
        max_tokens: The most tokens that a prompt will need.
        prompt: `plain` (the template of LWM's script), `chat` (the chat template of the tokenizer), or `completion`
            (the needle's own words up to the number, for models that follow no instructions; one query only).

    Raises:
        ValueError: If the text is too short, or the tokenizer has no chat template.
    """

    def __init__(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int, prompt: str) -> None:
        self._tokenizer, self._prompt = tokenizer, prompt
        self._ids: list[int] = []
        for text in texts:
            self._ids += self._encode(("\n\n" if self._ids else "") + text)
            if len(self._ids) >= 2 * max_tokens:
                break
        if len(self._ids) < max_tokens:
            raise ValueError(
                f"the haystack has {len(self._ids)} tokens, and a prompt of {max_tokens} is asked for: give more text "
                "(haystack: synthetic:prose makes as much as is needed), or lower lengths"
            )
        texts_of = {token: tokenizer.decode([token]) for token in set(self._ids)}
        self._stops = {token for token, text in texts_of.items() if isinstance(text, str) and text.rstrip()[-1:] == "."}

    def build(
        self, draw: random.Random, needles: Needles, *, length: int, depth: float, answer_tokens: int
    ) -> list[int]:
        """Token ids of a prompt which, together with the answer, has `length` tokens.

        The first queried needle stands at `depth`, all others at depths that are drawn. A needle goes behind the last
        full stop before its place; at depth 1 it is the end of the text.

        Args:
            draw: Source of chance.
            needles: What to hide.
            length: Tokens of prompt and answer.
            depth: 0 is the beginning of the text, 1 its end.
            answer_tokens: Room for the answer.

        Raises:
            ValueError: If there is no room for the needles.
        """
        before, after = self._frame(needles.queried)
        hidden = {city: self._encode(_NEEDLE.format(city=city, number=n)) for city, n in needles.numbers.items()}
        room = length - len(before) - len(after) - sum(map(len, hidden.values())) - answer_tokens
        if room < 1:
            raise ValueError(
                f"{len(hidden)} needles, the question and an answer of {answer_tokens} tokens need more than {length} "
                "tokens: raise lengths, or lower needles or max_new_tokens"
            )
        start = draw.randint(0, len(self._ids) - room)
        text = self._ids[start : start + room]
        places = [
            (self._place(text, depth if city == needles.queried[0] else draw.random()), draw.random(), city)
            for city in hidden
        ]
        prompt, last = list(before), 0
        for place, _, city in sorted(places):
            prompt += [*text[last:place], *hidden[city]]
            last = place
        return [*prompt, *text[last:], *after]

    def _place(self, text: list[int], depth: float) -> int:
        """Where in the text a depth is: behind a full stop; at the very beginning where there is none before it."""
        if depth >= 1:
            return len(text)
        place = int(len(text) * depth)
        while place > 0 and text[place - 1] not in self._stops:
            place -= 1
        return place

    def _frame(self, queried: Sequence[str]) -> tuple[list[int], list[int]]:
        """The tokens before and after the text; special tokens at the very beginning as the tokenizer has them."""
        if self._prompt == "chat":
            if self._tokenizer.chat_template is None:
                raise ValueError("the tokenizer has no chat template: set prompt=plain or prompt=completion")
            content = f"{_CONTEXT}\n\n{question(queried)} {_INSTRUCTION}"
            chat = [{"role": "user", "content": content}]
            rendered = render_chat(self._tokenizer, chat, add_generation_prompt=True)
            head, _, tail = rendered.partition(_CONTEXT)
            return self._encode(head), self._encode(tail)
        if self._prompt == "completion":
            return opening(self._tokenizer), self._encode(_NEEDLE.format(city=queried[0], number="").rstrip())
        before = text_ids(self._tokenizer, "You are a helpful assistant. USER: ")
        return before, self._encode(f" {question(queried)} {_INSTRUCTION} ASSISTANT:")

    def _encode(self, text: str) -> list[int]:
        return plain_ids(self._tokenizer, text) if text else []
