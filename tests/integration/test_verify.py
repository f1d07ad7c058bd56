"""`difftune verify` as a user calls it, nothing replaced: trainings in processes of their own, two of them together."""

from difftune import cli
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM


def test_everything_that_a_cpu_can_try_holds(tmp_path, capsys):
    config = DiffTransformerConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        attention="diff_v2",
    )
    DiffTransformerForCausalLM(config).save_pretrained(tmp_path / "model")
    code = cli.main(["verify", "--model", str(tmp_path / "model"), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    held = [line.split(":")[0].split(maxsplit=1)[1] for line in printed.splitlines() if line.startswith("  holds")]
    assert held == [
        "sdpa = the equation",
        "packed = alone",
        "batch with padding = alone",
        "cache, token by token = whole",
        "export as difftune, loaded by transformers = ours",
        "adapter merged = beside the base",
        "a step and a padded generated batch in 32-true",
        "a step and a padded generated batch in bf16-mixed",
        "a step and a padded generated batch in 16-mixed",
        "micro-batches = one batch",
        "gone on from step 3 = straight through",
        "two devices with ddp = one",
        "two devices with fsdp = one",
    ]
    assert printed.splitlines()[-1].startswith("13 hold, 0 fail, ")
