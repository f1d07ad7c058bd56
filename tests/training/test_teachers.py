from itertools import pairwise

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from difftune.training.teachers import OnlineTeacher
from tests.training.teaching import VOCABULARY, build_arithmetic, build_llama, build_student, one_batch


@pytest.mark.parametrize("build", [build_llama, build_student], ids=["transformers", "ours"])
def test_packed_documents_are_scored_as_if_alone(build):
    model = build()
    teacher = OnlineTeacher(model, vocab_size=VOCABULARY)
    batch = one_batch(build_arithmetic())
    hidden, weight = teacher(batch)
    logits = (hidden @ weight.T).flatten(0, 1)
    borders = batch["cu_seqlens"].tolist()
    assert len(borders) > 4
    for start, end in pairwise(borders):
        alone = model(input_ids=batch["input_ids"].flatten()[None, start:end]).logits[0]
        torch.testing.assert_close(logits[start:end], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [build_llama, build_student], ids=["transformers", "ours"])
def test_stored_scores_are_those_of_a_batch(build):
    teacher = OnlineTeacher(build(), vocab_size=VOCABULARY)
    batch = one_batch(build_arithmetic(packing=False, micro_batch_size=3))
    lengths = batch["attention_mask"].sum(1).tolist()
    documents = [row[:length] for row, length in zip(batch["input_ids"], lengths, strict=True)]
    learned = [row[:length] != -100 for row, length in zip(batch["labels"], lengths, strict=True)]
    stored = teacher.score(documents, learned, 5, 2.0)
    hidden, weight = teacher(batch)
    expected = torch.log_softmax(hidden @ weight.T / 2.0, dim=-1)
    for row, (document, labels, top) in enumerate(zip(documents, learned, stored, strict=True)):
        at = labels.nonzero().squeeze(1) - 1
        assert top.indices.shape == (len(at), 5) and len(document) > len(at)
        torch.testing.assert_close(top.log_probs, expected[row, at].topk(5).values, rtol=1e-5, atol=1e-5)


def test_rows_beyond_the_students_vocabulary_are_left_out():
    teacher = OnlineTeacher(build_llama(vocab_size=VOCABULARY + 26), vocab_size=VOCABULARY)
    assert teacher(one_batch(build_arithmetic())).weight.shape == (VOCABULARY, 40)
    with pytest.raises(ValueError, match=f"vocabulary has {VOCABULARY - 1} rows, the student's {VOCABULARY}"):
        OnlineTeacher(build_llama(vocab_size=VOCABULARY - 1), vocab_size=VOCABULARY)


def test_nothing_of_a_teacher_can_be_trained():
    model = build_student().train()
    teacher = OnlineTeacher(model, vocab_size=VOCABULARY)
    states = teacher(one_batch(build_arithmetic()))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert not states.hidden.requires_grad and states.hidden.grad_fn is None


def build_gemma():
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.5,
        initializer_range=0.5,
    )
    return Gemma2ForCausalLM(config)


CAPPED = "Gemma2ForCausalLM cannot be a teacher: its logits are not its head applied"


def test_a_model_whose_logits_are_capped_is_refused():
    with pytest.raises(ValueError, match=CAPPED):
        OnlineTeacher(build_gemma(), vocab_size=VOCABULARY)


def test_a_model_that_is_filled_when_it_is_sharded_is_tried_then():
    whole = build_gemma()
    with torch.device("meta"):
        model = build_gemma()

    def fill(model, device):
        model.to_empty(device=device)
        model.load_state_dict(whole.state_dict())
        for name, buffer in whole.named_buffers():
            model.get_buffer(name).copy_(buffer)

    teacher = OnlineTeacher(model, vocab_size=VOCABULARY, load_weights=fill)
    teacher.shard(lambda model: None, torch.device("cpu"))
    with pytest.raises(ValueError, match=CAPPED):
        teacher.to(torch.device("cpu"))


def test_a_model_that_mixes_packed_documents_is_refused(monkeypatch):
    model = build_llama()
    decoder = model.get_decoder()
    forward = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs))
    with pytest.raises(ValueError, match=r"its documents see one another; set data\.packing=false"):
        OnlineTeacher(model, vocab_size=VOCABULARY)
