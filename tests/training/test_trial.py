import pytest
import torch

from difftune.modeling import DiffTransformerForCausalLM, modeling
from difftune.training.finetune import FinetuneModule
from difftune.training.trial import generate_padded, take_trial
from tests.training.teaching import build_arithmetic, build_student

PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
KINDS = ("diff_v1", "diff_v2", "softmax")


def trial_of(model: DiffTransformerForCausalLM, precision: str):
    module = FinetuneModule(model, lr=1e-3, schedule="constant")
    return take_trial(module, build_arithmetic(), precision=precision, accelerator="cpu")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("attention", KINDS)
def test_a_step_is_taken_and_a_batch_is_generated_in_the_precision_of_the_trainer(attention, precision, monkeypatch):
    calls = []
    right = modeling.DiffTransformerModel.forward

    def forward(self, *arguments, **options):
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        calls.append((autocast, torch.is_grad_enabled(), options.get("use_cache")))
        return right(self, *arguments, **options)

    monkeypatch.setattr(modeling.DiffTransformerModel, "forward", forward)
    model = build_student(attention=attention)
    before = model.model.norm.weight.clone()
    trial = trial_of(model, precision)
    assert trial.loss > 0 and trial.grad_norm > 0 and trial.generated == 4
    assert not torch.equal(model.model.norm.weight, before)
    # The step, the prompts, and three tokens one by one.
    expected = PRECISIONS[precision]
    assert [call[:2] for call in calls] == [(expected, True)] + [(expected, False)] * 4


@pytest.mark.parametrize("attention", KINDS)
def test_the_batch_is_padded_on_the_left_and_reads_enough_keys_from_the_cache(attention):
    masks = []
    model = build_student(attention=attention).train()
    model.register_forward_pre_hook(lambda *call: masks.append(call[2]["attention_mask"]), with_kwargs=True)
    assert generate_padded(model) == 4 and model.training and model.lm_head.training
    assert masks[0].sum(1).tolist() == [12, 5] and masks[0][:, -1].all() and not masks[0][1, :7].any()
    # The path for a few queries over the cache begins behind 8 keys.
    assert [mask.shape[1] for mask in masks] == [12, 13, 14, 15]


def test_a_model_of_few_positions_is_tried_within_them():
    assert generate_padded(build_student(max_position_embeddings=8)) == 4


def test_an_end_of_text_token_does_not_end_the_batch_early():
    model = build_student()
    model.generation_config.eos_token_id = list(range(1, model.config.vocab_size))
    assert generate_padded(model) == 4


@pytest.mark.usefixtures("padding_fails_in_half")
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_a_batch_that_fails_is_one_message_with_the_precision_and_a_remedy(precision):
    assert trial_of(build_student(), "32-true").generated == 4
    with pytest.raises(ValueError, match=f"generated texts in {precision} fails: value.*; set trainer.precision=32-tr"):
        trial_of(build_student(), precision)


def test_a_step_that_fails_is_one_message(monkeypatch):
    def fail(self, *arguments, **options):
        raise RuntimeError("expected scalar type Float but found BFloat16")

    monkeypatch.setattr(DiffTransformerForCausalLM, "forward", fail)
    with pytest.raises(ValueError, match=r"^one step in bf16-mixed fails: expected scalar type Float.*; set trainer"):
        trial_of(build_student(), "bf16-mixed")
    with pytest.raises(
        ValueError, match=r"^one step in 32-true fails: .*BFloat16; choose another model.attention_back"
    ):
        trial_of(build_student(), "32-true")


def test_logits_that_are_not_finite_are_a_failure():
    model = build_student()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.inf
    with pytest.raises(ValueError, match="logits are not finite"):
        generate_padded(model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused_as_by_a_training():
    module = FinetuneModule(build_student(), lr=1e-3, schedule="constant")
    with pytest.raises(ValueError, match=r"trainer\.accelerator=gpu wants"):
        take_trial(module, build_arithmetic(), precision="32-true", accelerator="gpu")
