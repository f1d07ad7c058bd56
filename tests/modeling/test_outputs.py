import pickle

import torch

from difftune.modeling import DiffCausalLMOutput
from difftune.modeling.compat import CACHE


def test_logits_that_nobody_reads_are_never_computed():
    calls = []

    def head(hidden):
        calls.append(hidden)
        return 2 * hidden

    hidden = torch.ones(1, 2, 3)
    output = DiffCausalLMOutput(loss=torch.tensor(1.0), last_hidden_state=hidden).compute_logits_by(head)
    assert list(output.keys()) == ["loss", "last_hidden_state"] and "logits" not in output
    assert output.to_tuple() == (output.loss, hidden) and not calls
    assert torch.equal(output.logits, 2 * hidden) and output.logits is output.logits and len(calls) == 1


def test_logits_that_are_held_are_what_they_are_in_other_outputs():
    logits = torch.randn(1, 2, 3)
    output = DiffCausalLMOutput(logits=logits, **{CACHE: None})
    assert output.logits is logits and output["logits"] is logits and output[0] is logits
    assert list(output.keys()) == ["logits"]
    output.logits = logits + 1
    assert torch.equal(output["logits"], logits + 1)
    assert torch.equal(pickle.loads(pickle.dumps(output)).logits, logits + 1)


def test_without_labels_and_without_logits_there_are_none():
    assert DiffCausalLMOutput(loss=torch.tensor(1.0)).logits is None
