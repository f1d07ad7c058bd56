"""What other libraries do with our models as with any of transformers': PEFT's tuners, TRL, transformers' Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import (
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import Trainer, TrainingArguments

from difftune.data.tokenizers import build_tokenizer
from difftune.modeling import DiffTransformerForCausalLM
from tests.modeling.test_attention import KINDS, build

TARGETS = {"softmax": ["q_proj", "v_proj"], "diff_v1": ["q1_proj", "q2_proj"], "diff_v2": ["q1_proj", "q2_proj"]}
TUNERS = {
    "lora": lambda targets: LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=4),
    "lora on all": lambda targets: LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4),
    "dora": lambda targets: LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=4, use_dora=True),
    "ia3": lambda targets: IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=[]),
    "vera": lambda targets: VeraConfig(task_type="CAUSAL_LM", target_modules=["down_proj"], r=4),
    "oft": lambda targets: OFTConfig(task_type="CAUSAL_LM", target_modules=targets, oft_block_size=8, r=0),
    "prefix": lambda targets: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt": lambda targets: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
WITH_PROMPTS = ("prefix", "prompt")
ROWS = [[2 + (7 * n + 3 * at) % 30 for at in range(length)] for n, length in enumerate((9, 14, 5, 20, 11, 7, 16, 12))]


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tuner_of_peft_learns_generates_and_comes_back(kind: str, tuner: str, tmp_path: Path) -> None:
    config: PeftConfig = TUNERS[tuner](TARGETS[kind])
    base = build(kind)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model: Any = get_peft_model(base, config)
    x = torch.randint(2, 32, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    model(input_ids=x, labels=x, attention_mask=mask).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.eval()
    logits = model(input_ids=x, attention_mask=mask).logits
    untouched = build(kind)
    untouched.load_state_dict(weights)
    assert not torch.allclose(logits[:, -7:], untouched(x, attention_mask=mask).logits, atol=1e-4)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    written = model.generate(input_ids=x, **options)
    assert written.shape == (2, 11)
    if tuner not in WITH_PROMPTS:
        # Greedy decoding with the cache takes what the whole row without one would.
        row = torch.cat((mask, torch.ones(2, 4, dtype=mask.dtype)), dim=1)
        again = model(input_ids=written, attention_mask=row).logits[:, -5:-1].argmax(-1)
        assert torch.equal(written[:, -4:], again)
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(untouched, tmp_path).eval()
    assert torch.equal(loaded(input_ids=x, attention_mask=mask).logits, logits)
    if tuner not in WITH_PROMPTS:
        merged = loaded.merge_and_unload()
        assert isinstance(merged, DiffTransformerForCausalLM)
        real = mask.bool()
        torch.testing.assert_close(merged(x, attention_mask=mask).logits[real], logits[real], rtol=1e-4, atol=1e-4)


def mean_loss(model: DiffTransformerForCausalLM, rows: list[list[int]]) -> float:
    """Nats a label token over the rows, each alone; the first three tokens of each are not learned."""
    outputs = [model(torch.tensor([row]), labels=torch.tensor([[-100] * 3 + row[3:]])) for row in rows]
    return float(sum(out.loss_sum for out in outputs) / sum(out.num_label_tokens for out in outputs))


def pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
        for name, value in fill.items()
    }


def dataset() -> Dataset:
    return Dataset.from_list([{"input_ids": row, "labels": [-100] * 3 + row[3:]} for row in ROWS])


ONE_STEP: dict[str, Any] = {
    "max_steps": 1,
    "learning_rate": 0.0,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_of_transformers_takes_the_mean_over_the_tokens_of_the_whole_step(
    kind: str, tmp_path: Path
) -> None:
    model = build(kind)
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=4, **ONE_STEP
    )
    data = dataset()
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, data_collator=pad)
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(mean_loss(model, ROWS), rel=1e-5)


@pytest.mark.parametrize(
    "packing",
    [{}, {"packing": True, "packing_strategy": "bfd", "max_length": 32}, {"padding_free": True, "max_length": None}],
    ids=["plain", "packed", "padding-free"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_trl_trains_on_the_loss_of_each_document_alone(kind: str, packing: dict[str, Any], tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed (the extra `bench`)")
    model = build(kind, vocab_size=262)
    expected = mean_loss(model, ROWS)
    config = trl.SFTConfig(str(tmp_path), per_device_train_batch_size=8, bf16=False, **ONE_STEP, **packing)
    trainer = trl.SFTTrainer(
        model=model, args=config, train_dataset=dataset(), processing_class=build_tokenizer("bytes")
    )
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["loss"] == pytest.approx(expected, rel=1e-5)
    # Read from the logits, which are there for those who ask.
    assert 0 <= logged["mean_token_accuracy"] <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_generates_from_embeddings_as_from_tokens(kind: str) -> None:
    model = build(kind)
    x = torch.randint(2, 32, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.generate(input_ids=x, **options)
    embeddings = model.get_input_embeddings()(x)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **options), expected[:, 7:])
    assert torch.equal(model.generate(input_ids=x, inputs_embeds=embeddings, **options), expected)
