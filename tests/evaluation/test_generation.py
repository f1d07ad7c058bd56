import copy
import logging
import random
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from difftune.data.tokenizers import build_tokenizer
from difftune.evaluation.generation import Generation, generate_texts
from tests.clock import Clock
from tests.evaluation.scripted import tiny_model

PROMPTS = ["1", "12+7-15", "3+4", "9", "20-1+13-5", "7-7", "<|user|>8+8<|assistant|>"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer("digits")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=102,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config)


MODELS = {"llama": llama, **{kind: lambda kind=kind: tiny_model(kind) for kind in ("diff_v1", "diff_v2", "softmax")}}


@torch.no_grad()
def greedy(model: Any, prompt: list[int], max_new_tokens: int, eos: int) -> list[int]:
    """One prompt, no cache, no padding: the loop that everything else must equal."""
    model.eval()
    row = list(prompt)
    while len(row) < len(prompt) + max_new_tokens and (len(row) == len(prompt) or row[-1] != eos):
        logits = model(input_ids=torch.tensor([row]), use_cache=False).logits
        row.append(int(logits[0, -1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
def test_batches_write_what_single_prompts_without_a_cache_do(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = MODELS[name]()
    expected = [
        greedy(model, tokenizer(text, add_special_tokens=False)["input_ids"], 16, tokenizer.eos_token_id)
        for text in PROMPTS
    ]
    for batch_size in (3, 16):
        found = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=16, batch_size=batch_size)
        assert [g.text for g in found] == [tokenizer.decode(row, skip_special_tokens=True) for row in expected]
        assert [g.num_tokens for g in found] == [len(row) for row in expected]
        assert [g.finished for g in found] == [row[-1] == tokenizer.eos_token_id for row in expected]
    assert len({g.text for g in found}) > 3, "the models must not be so dull that an exchange of rows would not show"


def test_the_end_of_text_ends_a_row_and_is_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0
    never = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=5)
    assert all(g == Generation(g.text, 5, finished=False) for g in never)
    tokenizer_that_ends = build_tokenizer("digits")
    tokenizer_that_ends.eos_token = never[0].text[1]
    ended = generate_texts(model, tokenizer_that_ends, PROMPTS[:1], max_new_tokens=5)
    assert ended == [Generation(never[0].text[0], 2, finished=True)]


@pytest.mark.parametrize("kind", ["none", "same as eos"])
def test_no_padding_token_of_its_own_is_needed(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    other = build_tokenizer("digits")
    other.pad_token = None if kind == "none" else other.eos_token
    model = tiny_model()
    found = generate_texts(model, other, PROMPTS, max_new_tokens=20)
    assert found == generate_texts(model, tokenizer, PROMPTS, max_new_tokens=20)


def test_prompts_may_be_token_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model()
    ids = [tokenizer(text)["input_ids"] for text in PROMPTS]
    before = [list(row) for row in ids]
    assert generate_texts(model, tokenizer, ids, max_new_tokens=8) == generate_texts(
        model, tokenizer, PROMPTS, max_new_tokens=8
    )
    assert ids == before


def test_a_padding_token_that_the_model_writes_is_a_token(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=5)
    assert tokenizer.pad_token_id == 0 and found == [Generation("", 5, finished=False)] * len(PROMPTS)


def test_no_prompts_give_no_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    assert generate_texts(tiny_model(), tokenizer, [], max_new_tokens=8) == []


def test_samples_are_reproducible_by_seed(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model(initializer_range=0.1)

    def sample(seed: int, prompts: list[str] = PROMPTS, **settings: Any) -> list[Generation]:
        settings = {"max_new_tokens": 12, "batch_size": 2, "temperature": 0.9, **settings}
        torch.rand(random.randrange(1, 50))  # whatever was drawn before must not matter
        return generate_texts(model, tokenizer, prompts, seed=seed, **settings)

    first = sample(0)
    assert sample(0) == first
    assert sample(1) != first
    assert sample(0, top_p=0.05) != first
    assert sample(0, temperature=1e-4) == generate_texts(model, tokenizer, PROMPTS, max_new_tokens=12)


def test_a_sample_does_not_depend_on_what_is_decoded_beside_it(tokenizer: PreTrainedTokenizerBase) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9, "seed": 5}
    model = tiny_model(initializer_range=0.1)
    together = generate_texts(model, tokenizer, PROMPTS, batch_size=len(PROMPTS), **settings)
    assert generate_texts(model, tokenizer, PROMPTS, batch_size=1, **settings) == together
    odd = range(1, len(PROMPTS), 2)
    part = generate_texts(model, tokenizer, [PROMPTS[i] for i in odd], batch_size=2, numbers=list(odd), **settings)
    assert part == [together[i] for i in odd]


def test_equal_prompts_get_different_samples(tokenizer: PreTrainedTokenizerBase) -> None:
    found = generate_texts(
        tiny_model(initializer_range=0.1), tokenizer, ["1+1"] * 6, max_new_tokens=12, batch_size=2, temperature=1.0
    )
    assert len({g.text for g in found}) > 3


def test_nothing_outlasts_the_call(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model(use_cache=False)
    model.train()
    model.gradient_checkpointing_enable()
    model.model.layers[0].eval()  # a frozen part
    modes = [module.training for module in model.modules()]
    own = model.generation_config
    written = own.to_dict()
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    generate_texts(model, tokenizer, PROMPTS, max_new_tokens=6, temperature=1.0, seed=3)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert (np.random.get_state()[1] == state[2]).all()
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is own and own.to_dict() == written
    assert model.config.use_cache is False
    assert model.model.gradient_checkpointing
    assert torch.is_grad_enabled() and all(p.grad is None and p.requires_grad for p in model.parameters())


def test_nothing_outlasts_a_failure(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model().train()
    own, state = model.generation_config, torch.get_rng_state()

    def fail(**unused: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate_texts(model, tokenizer, PROMPTS, max_new_tokens=6)
    assert model.training and model.generation_config is own and torch.equal(torch.get_rng_state(), state)


def test_the_models_own_generation_config_is_not_used(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model()
    expected = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=20)
    own = model.generation_config
    own.repetition_penalty, own.num_beams, own.do_sample, own.max_length, own.no_repeat_ngram_size = 5.0, 3, True, 4, 1
    assert generate_texts(model, tokenizer, PROMPTS, max_new_tokens=20) == expected


@pytest.mark.parametrize("batch_size", [1, 16])
def test_a_stop_string_ends_its_row_only(batch_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model()
    plain = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=20)
    mark = plain[0].text[4:6]
    found = generate_texts(
        model, tokenizer, PROMPTS, max_new_tokens=20, batch_size=batch_size, stop=[mark, "never there"]
    )
    assert any(mark in g.text for g in plain) and not all(mark in g.text for g in plain)
    for before, after in zip(plain, found, strict=True):
        if mark in before.text:
            assert after.text == before.text.split(mark)[0] and after.finished
            assert after.num_tokens <= before.num_tokens
        else:
            assert after == before


def test_padding_behind_a_stop_string_is_no_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Without a padding token a batch is padded with the end-of-text token."""
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    texts = [text.text for text in generate_texts(tiny_model(), tokenizer, PROMPTS, max_new_tokens=20)]
    mark = max(texts, key=len)[3:5]
    settings: dict[str, Any] = {"max_new_tokens": 20, "stop": [mark]}
    expected, found = (generate_texts(tiny_model(), each, PROMPTS, **settings) for each in (tokenizer, bare))
    assert found == expected and [text.ids for text in found] == [text.ids for text in expected]
    assert len({text.num_tokens for text in found}) > 1


def test_a_stop_string_that_began_in_the_prompt_ends_the_row(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model()
    first = generate_texts(model, tokenizer, ["7-7"], max_new_tokens=1)[0].text
    found = generate_texts(model, tokenizer, ["7-7"], max_new_tokens=9, stop=["7" + first])
    assert found == [Generation(first, 1, finished=True)]


def test_a_deadline_that_has_passed_leaves_all_undone(tokenizer: PreTrainedTokenizerBase) -> None:
    found = generate_texts(tiny_model(), tokenizer, PROMPTS, max_new_tokens=20, deadline=time.monotonic() - 1)
    assert found == [Generation("", 0, finished=False, interrupted=True)] * len(PROMPTS)


def test_a_deadline_ends_a_batch_in_the_middle(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, "difftune.evaluation.generation", a_look=0.25)
    model = tiny_model(max_position_embeddings=100_000)
    found = generate_texts(model, tokenizer, ["1", "2+2"], max_new_tokens=20_000, deadline=clock.now + 10)
    assert clock.now - 1000 < 11, "it looks no more, or seldom"
    # A look before each batch and one a token: four of them a second.
    assert all(g.finished or (g.interrupted and 30 < g.num_tokens <= 40) for g in found)
    assert any(g.interrupted for g in found)


def test_should_stop_is_polled_at_every_token(tokenizer: PreTrainedTokenizerBase) -> None:
    polls = 0

    def should_stop() -> bool:
        nonlocal polls
        polls += 1
        return polls > 9

    model = tiny_model()
    plain = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=1)
    found = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=1, should_stop=should_stop)
    assert polls < 15
    done = [g for g in found if not g.interrupted]
    assert 0 < len(done) < len(PROMPTS)
    assert all(after == before for before, after in zip(plain, found, strict=True) if not after.interrupted)


def test_prompts_beyond_the_models_length_are_told(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="difftune.evaluation.generation"):
        generate_texts(tiny_model(max_position_embeddings=12), tokenizer, ["1", "1+2+3+4+5"], max_new_tokens=4)
    assert "1 of 2 prompts can reach beyond max_position_embeddings (12 tokens)" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p must be above 0"),
        ({"stop": "end"}, "stop must be a list of strings"),
        ({"stop": [""]}, "stop must be a list of strings"),
        ({"prompts": ["1", ""]}, "prompt 1 is empty"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=message):
        generate_texts(tiny_model(), tokenizer, **{"prompts": ["1"], "max_new_tokens": 4, **settings})


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = build_tokenizer("digits")
    tokenizer.eos_token = None
    model = tiny_model()
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="neither tokenizer nor generation config has an eos token"):
        generate_texts(model, tokenizer, ["1"], max_new_tokens=4)


def test_every_end_of_tokenizer_and_generation_config_ends_a_text(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model()
    (free,) = generate_texts(model, tokenizer, ["1"], max_new_tokens=8)
    at = next(place for place in range(2, 8) if free.ids[place] not in free.ids[:place])
    end = free.ids[at]
    for ends in (end, [end], [101, end], [end, tokenizer.eos_token_id]):
        model.generation_config.eos_token_id = ends
        # Beside one that ends later, and is what the other is padded to.
        found, _ = generate_texts(model, tokenizer, ["1", "12+7-15"], max_new_tokens=8)
        assert found.ids == free.ids[: at + 1] and found.finished
        assert found.text == tokenizer.decode(free.ids[:at], skip_special_tokens=True)
    own = build_tokenizer("digits")
    own.eos_token = str(own.convert_ids_to_tokens(end))
    model.generation_config.eos_token_id = [101]
    assert generate_texts(model, own, ["1"], max_new_tokens=8)[0].ids == free.ids[: at + 1]


@pytest.mark.gpu
def test_other_random_states_of_a_gpu_stay_too(tokenizer: PreTrainedTokenizerBase) -> None:
    model: nn.Module = tiny_model().cuda()
    states = torch.cuda.get_rng_state_all()
    found = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=6, temperature=1.0)
    assert all(torch.equal(a, b) for a, b in zip(torch.cuda.get_rng_state_all(), states, strict=True))
    assert found == generate_texts(model, tokenizer, PROMPTS, max_new_tokens=6, temperature=1.0)
