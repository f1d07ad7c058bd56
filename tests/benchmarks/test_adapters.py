from pathlib import Path

import pytest
import torch

from benchmarks import adapters
from difftune.data.tokenizers import build_tokenizer
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM


def test_every_way_starts_from_one_model_and_too_small_a_gain_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps from a random model gain nothing, whatever is trained."""
    tokenizer = build_tokenizer("digits")
    torch.manual_seed(0)
    config = DiffTransformerConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id,
    )
    DiffTransformerForCausalLM(config).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    arguments = [f"--start={tmp_path / 'start'}", "--steps=2", "--problems=4"]
    assert adapters.main([*arguments, "--presets=attention"]) == 1
    shown = capsys.readouterr().out
    lines = [line.split("|")[1:-1] for line in shown.splitlines() if line.startswith("|")][2:]
    names, parameters, rates = ([cells[i].strip() for cells in lines] for i in range(3))
    assert names == ["start", "full", "attention"] and rates == ["", "0.001", "0.003"]
    assert int(parameters[2].replace(",", "")) < int(parameters[1].replace(",", ""))
    assert "of the full gain, 0.9 are required" in shown


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="run `make quickstart` first, or give --start MODEL"):
        adapters.main([f"--start={tmp_path / 'none'}"])
    with pytest.raises(SystemExit, match="no such preset: attn; there are attention, all_linear"):
        adapters.main([f"--start={tmp_path}", "--presets=attn"])
