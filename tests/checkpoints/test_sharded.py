import json

import pytest
import torch

from difftune.checkpoints.diffllama import export_diffllama
from difftune.checkpoints.sharded import load_skeleton
from tests.ranks import run_ranks
from tests.training.scale_ranks import tiny_model


def write_models(folder):
    """Folders of every kind that is read in parts."""
    tiny_model(num_hidden_layers=2).save_pretrained(folder / "difftune")
    model = tiny_model(num_hidden_layers=2, tie_word_embeddings=True, lambda_warmup_steps=9, attention_bias=True)
    for layer in model.model.layers:
        layer.self_attn.lambda_full.advance()
    model.save_pretrained(folder / "difftune-tied-bf16", max_shard_size="20KB")
    model = tiny_model(num_hidden_layers=2)
    for layer in model.model.layers:
        # As a conversion leaves them that begins with the negative map alone.
        torch.nn.init.zeros_(layer.self_attn.q2_proj.weight)
        torch.nn.init.zeros_(layer.self_attn.k2_proj.weight)
    export_diffllama(model, folder / "diffllama")
    tiny_model(num_hidden_layers=2, attention="diff_v2").save_pretrained(folder / "diff_v2")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    write_models(folder / "models")
    run_ranks("tests.checkpoints.sharded_ranks", str(folder))
    return json.loads((folder / "results.json").read_text())


MODELS = ("difftune", "difftune-tied-bf16", "diffllama", "diff_v2")


@pytest.mark.parametrize("adapter", ["plain", "attention", "everything"])
@pytest.mark.parametrize("model", MODELS)
def test_a_model_loaded_in_shards_is_bitwise_that_of_one_process(loaded, model, adapter):
    result = loaded[f"{model}-{adapter}"]
    assert result["differing"] == []
    assert result["sharded"] > 10
    assert result["logits"] < 1e-5
    if adapter == "plain":
        assert result["tied"] == ("tied" in model)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_fresh_model_in_shards_is_bitwise_that_of_one_process(loaded, kind):
    result = loaded[f"fresh-{kind}"]
    assert result["differing"] == []
    assert result["tied"] == (kind == "tied")


def test_an_adapter_is_refused_with_the_command_that_helps(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"make one model of them first.*difftune merge"):
        load_skeleton(tmp_path)


def test_missing_and_misshapen_tensors_are_named(tmp_path):
    tiny_model(num_hidden_layers=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"missing .*model\.layers\.2"):
        load_skeleton(tmp_path)
