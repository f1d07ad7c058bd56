import pytest
import torch

from difftune.training.alignment import alignment_loss, attention_outputs
from tests.training.teaching import build_arithmetic, build_llama, build_student, one_batch


@pytest.mark.parametrize("build", [build_llama, build_student], ids=["transformers", "ours"])
def test_outputs_are_those_of_each_attention_and_no_hook_stays(build):
    model, ids = build(), one_batch(build_arithmetic())["input_ids"]
    with attention_outputs(model) as outputs:
        model(input_ids=ids)
    assert [tuple(output.shape) for output in outputs] == [(*ids.shape, model.config.hidden_size)] * 2
    assert not any(module._forward_hooks for module in model.modules())
    model(input_ids=ids)
    assert len(outputs) == 2


def test_the_loss_is_the_relative_squared_distance_summed_over_kept_tokens():
    teacher = [torch.randn(2, 5, 4) for _ in range(3)]
    keep = torch.rand(2, 5) > 0.4
    student = [torch.randn(2, 5, 4, requires_grad=True) for _ in range(3)]
    expected = torch.stack(
        [((s - t)[keep] ** 2).sum() / ((t[keep] ** 2).sum(-1)).mean() for s, t in zip(student, teacher, strict=True)]
    ).mean()
    torch.testing.assert_close(alignment_loss(student, teacher, keep), expected)
    zeros = [torch.zeros(2, 5, 4, requires_grad=True) for _ in range(3)]
    torch.testing.assert_close(alignment_loss(zeros, teacher, keep), keep.sum().float())
    same = [t.clone().requires_grad_() for t in teacher]
    assert alignment_loss(same, teacher, keep) == 0


def test_no_kept_token_gives_zero_with_a_graph():
    student = [torch.randn(1, 3, 4, requires_grad=True)]
    loss = alignment_loss(student, [torch.randn(1, 3, 4)], torch.zeros(1, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and not student[0].grad.any()


def test_what_cannot_be_matched_is_refused():
    one = [torch.randn(1, 3, 4, requires_grad=True)]
    keep = torch.ones(1, 3, dtype=torch.bool)
    for other in ([], [torch.randn(1, 3, 4)] * 2, [torch.randn(1, 3, 5)]):
        with pytest.raises(ValueError, match=r"the model that the student was converted from.*align_weight=0"):
            alignment_loss(one, other, keep)
    with pytest.raises(ValueError, match=r"carry no gradient: .* needs model\.gradient_checkpointing=false"):
        alignment_loss([torch.randn(1, 3, 4)], [torch.randn(1, 3, 4)], keep)
