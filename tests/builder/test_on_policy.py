from itertools import pairwise

import pytest
import torch

from difftune.builder.on_policy import StudentSampler
from difftune.data.batches import packed_batch
from difftune.data.chat import encode_examples
from difftune.data.formats import Example
from tests.training.teaching import TOKENIZER, build_arithmetic, build_student, one_batch


def sample(batch, student=None, *, number=0, rank=0, **settings):
    settings = {"seq_len": 64, "max_new_tokens": 16, "seed": 0, **settings}
    return StudentSampler(TOKENIZER, **settings)(student or build_student(), batch, number, rank)


def documents(batch):
    """Ids and which of them are labels, row by row, padding left out."""
    rows = [[] for _ in batch["input_ids"]]
    width = batch["input_ids"].shape[1]
    if "cu_seqlens" in batch:
        spans = [(*divmod(a, width), b - a) for a, b in pairwise(batch["cu_seqlens"].tolist())]
    else:
        spans = [(row, 0, length) for row, length in enumerate(batch["attention_mask"].sum(1).tolist())]
    for row, start, length in spans:
        ids, labels = (batch[name][row, start : start + length] for name in ("input_ids", "labels"))
        if (labels != -100).any():
            assert batch["position_ids"][row, start : start + length].tolist() == list(range(length))
            assert torch.equal(labels[labels != -100], ids[labels != -100])
            rows[row].append((ids.tolist(), (labels != -100).tolist()))
    return rows


def prompt(document):
    ids, learned = document
    return ids[: learned.index(True)]


@pytest.mark.parametrize("packing", [True, False])
def test_every_prompt_keeps_its_place_and_only_what_was_written_is_learned(packing):
    batch = one_batch(build_arithmetic(packing=packing, micro_batch_size=3))
    before, own = documents(batch), documents(sample(batch))
    assert [[prompt(d) for d in row] for row in own] == [[prompt(d) for d in row] for row in before]
    assert [d for row in own for d in row] != [d for row in before for d in row]
    for ids, learned in (document for row in own for document in row):
        start, eos = learned.index(True), TOKENIZER.eos_token_id
        assert all(learned[start:]), "one answer, to the end"
        assert eos not in ids[start:-1], "nothing is learned behind the end"
        assert ids[-1] == eos or len(ids) - start <= 16


def with_eos_logit(value):
    """A student whose logit of the end-of-text token is always this."""
    student = build_student()
    logits = student.lm_head.forward

    def forward(hidden):
        found = logits(hidden).clone()
        found[..., TOKENIZER.eos_token_id] = value
        return found

    student.lm_head.forward = forward
    return student


def test_packed_answers_share_what_the_prompts_leave():
    batch = one_batch(build_arithmetic(micro_batch_size=3))
    own = sample(batch, with_eos_logit(-1e4), max_new_tokens=60)
    assert own["input_ids"].shape == batch["input_ids"].shape
    for row in documents(own):
        room = (64 - sum(len(prompt(d)) for d in row)) // len(row)
        assert {sum(learned) for _, learned in row} == {room}


def test_an_answer_ends_at_the_limit_and_at_the_end_of_text():
    batch = one_batch(build_arithmetic())
    assert {sum(learned) for row in documents(sample(batch, max_new_tokens=1)) for _, learned in row} == {1}
    found = [(ids[-1], sum(learned)) for row in documents(sample(batch, with_eos_logit(1e4))) for ids, learned in row]
    assert set(found) == {(TOKENIZER.eos_token_id, 1)}


def test_samples_depend_on_seed_batch_and_rank_alone():
    batch, student = one_batch(build_arithmetic()), build_student().train()
    state = torch.get_rng_state()
    first = sample(batch, student)["input_ids"]
    assert torch.equal(torch.get_rng_state(), state) and student.training
    torch.manual_seed(99)
    assert torch.equal(sample(batch, student)["input_ids"], first)
    for other in ({"number": 1}, {"rank": 1}, {"seed": 1}):
        assert not torch.equal(sample(batch, student, **other)["input_ids"], first)


def test_the_last_of_several_answers_is_written_anew_and_the_others_are_read():
    turns = [("user", "1+1"), ("assistant", "2"), ("user", "2+3"), ("assistant", "5")]
    chat = Example([{"role": role, "content": content} for role, content in turns])
    batch = packed_batch([encode_examples(TOKENIZER, [chat], ["a chat"])], 64, TOKENIZER.pad_token_id)
    (((ids, learned),),) = documents(sample(batch))
    asked = TOKENIZER.decode(ids[: learned.index(True)])
    assert asked.endswith("<|user|>2+3<|assistant|>") and "<|assistant|>2<|eos|>" in asked


@pytest.mark.parametrize("packing", [True, False])
def test_a_rank_without_rows_keeps_its_padding(packing):
    batch = one_batch(build_arithmetic(packing=packing))
    batch["labels"].fill_(-100)
    own = sample(batch)
    assert not (own["labels"] != -100).any() and len(own["input_ids"]) == 2
