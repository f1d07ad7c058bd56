import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import recover_v1
from benchmarks.recover_v1 import BASELINE
from benchmarks.upcycle_v1 import build
from difftune.checkpoints.llama import config_from_llama
from difftune.checkpoints.streams import in_order
from difftune.checkpoints.upcycle import config_to_v1, to_diff_v1


def test_every_way_has_its_share_at_each_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recover_v1, "TEST_ROWS", 16)
    monkeypatch.setattr(recover_v1, "WAYS", {name: recover_v1.WAYS[name] for name in (BASELINE, "forward KL")})
    sizes = ["--steps", "3", "--recovery", "1", "--hidden-size", "16", "--threads", "1"]
    recover_v1.main([*sizes, "--seeds", "2", "--lr", "1e-3", "2e-3"])
    shown = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown if line.startswith("|")][2:]
    names = [*recover_v1.WAYS, recover_v1.LLAMA]
    assert [row[:2] for row in rows] == [[name, lr] for name in names for lr in ("0.001", "0.002")]
    assert all("%" in row[2] and "±" in row[2] for row in rows)
    # Each is there as soon as it is known, before the table.
    assert sum(line.startswith("seed 1: ") for line in shown) == 1 + len(rows)
    ahead = [row[4] for row in rows]
    assert ahead[-2:] == ["", ""] and sum(text == "" for text in ahead[:2]) == 1, "cross entropy at its best rate"


def test_an_interval_is_that_of_students_t() -> None:
    # Mean 2, standard deviation 1, n = 3: 4.303 / sqrt(3).
    assert recover_v1.interval([1.0, 2.0, 3.0], "{:.3f}") == "2.000 ± 2.484"
    assert recover_v1.interval([0.5]) == "+50.0%"


def test_a_teacher_that_knows_the_text_brings_back_more_than_the_text_alone() -> None:
    """Here the text is written by the teacher, so what can be recovered is what the conversion lost, to both ways."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    llama = LlamaForCausalLM(config).eval()
    own = config_from_llama(config)
    target = config_to_v1(own, subln="plain", lambda_init=0.05)
    tensors = {name: tensor for name, tensor in llama.state_dict().items() if name != "lm_head.weight"}
    converted = build(target, dict(to_diff_v1(own, target, in_order(tensors))))
    first = torch.arange(64).repeat(6)[:, None]
    rows = llama.generate(first, do_sample=True, top_k=0, max_new_tokens=31, pad_token_id=0)
    rows = rows[torch.randperm(len(rows))]
    learned, held_out = rows[:256], rows[256:]

    class Texts(recover_v1.Bytes):
        def train_dataloader(self) -> DataLoader:
            return DataLoader([{"input_ids": ids, "labels": ids} for ids in learned.split(16)], batch_size=None)

    @torch.no_grad()
    def loss(model: torch.nn.Module) -> float:
        return model.eval()(input_ids=held_out, labels=held_out).loss.item()

    before, after = loss(llama), loss(converted)
    assert after - before > 0.05, "there is something to recover"
    shares = {}
    for name in (BASELINE, "forward KL"):
        student = recover_v1.recover(converted, llama, recover_v1.WAYS[name], Texts(rows.flatten(), 0), 16, 3e-3)
        shares[name] = (after - loss(student)) / (after - before)
    assert shares["forward KL"] > 0.2
    assert shares["forward KL"] > shares[BASELINE] + 0.05, shares
