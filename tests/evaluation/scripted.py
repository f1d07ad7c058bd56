"""A stand-in for a language model: it writes what it was told to, so that the arithmetic around it can be checked."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM


@dataclass
class Problem:
    id: str
    question: str
    answer: str
    prompt_messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_messages = self.prompt_messages or [{"role": "user", "content": self.question}]


class ScriptedModel(nn.Module):
    """Continues the prompt that asks a question with the text that `answers` has for it, an "@" standing for the end.

    Of several texts, a prompt gets the next one each time it comes up.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, answers: dict[str, str | list[str]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.generation_config = GenerationConfig()
        self.tokenizer = tokenizer
        self.answers = {
            question: [texts] if isinstance(texts, str) else list(texts) for question, texts in answers.items()
        }

    def generate(self, input_ids: torch.Tensor, generation_config: GenerationConfig, **unused: Any) -> torch.Tensor:
        """Append the texts, cut at max_new_tokens and padded."""
        rows = []
        for prompt in input_ids:
            question = self.tokenizer.decode(prompt, skip_special_tokens=True)
            texts = self.answers[question]
            text = texts.pop(0) if len(texts) > 1 else texts[0]
            row = self.tokenizer(text.rstrip("@"), add_special_tokens=False)["input_ids"]
            row += [self.tokenizer.eos_token_id] if text.endswith("@") else []
            rows.append(row[: generation_config.max_new_tokens])
        width = max(map(len, rows))
        padded = [row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in rows]
        return torch.cat((input_ids, torch.tensor(padded)), dim=1)


def tiny_model(kind: str = "diff_v1", **changes: Any) -> DiffTransformerForCausalLM:
    """A random model for the digits tokenizer, rough enough to write different things after different prompts."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 102,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "attention": kind,
        "initializer_range": 0.4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return DiffTransformerForCausalLM(DiffTransformerConfig(**settings | changes))
