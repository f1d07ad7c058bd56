import pytest
import torch

from difftune.checkpoints import export, merge
from difftune.modeling import DiffTransformerConfig
from difftune.verification.files import verify_files

EXPORTS = ["export as difftune, loaded by transformers = ours", "export as diffllama, loaded by transformers = ours"]
MERGE = "adapter merged = beside the base"


def states(tmp_path, attention="diff_v1"):
    config = DiffTransformerConfig(
        hidden_size=64, num_attention_heads=8, num_key_value_heads=4, attention=attention, num_hidden_layers=1
    )
    return {claim.what: claim.state for claim in verify_files(config, tmp_path)}


@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2", "softmax"])
def test_exports_and_merges_hold_where_the_format_has_the_kind(tmp_path, attention):
    other = "holds" if attention == "diff_v1" else "not tried"
    assert states(tmp_path, attention) == {EXPORTS[0]: "holds", EXPORTS[1]: other, MERGE: "holds"}


def test_an_export_of_other_weights_fails(tmp_path, monkeypatch):
    right = export._WRITERS["diffllama"]

    def wrong(model, folder):
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0] *= 1.5
            right(model, folder)
            model.model.layers[0].mlp.up_proj.weight[0] /= 1.5

    monkeypatch.setitem(export._WRITERS, "diffllama", wrong)
    assert states(tmp_path) == {EXPORTS[0]: "holds", EXPORTS[1]: "fails", MERGE: "holds"}


def test_a_merge_that_forgets_an_adapted_projection_fails(tmp_path, monkeypatch):
    right = merge.merged_tensors

    def wrong(adapted, name, *, dtype=None):
        tensors = dict(right(adapted, name, dtype=dtype))
        key = "model.layers.0.self_attn.q1_proj.weight"
        tensors[key] = adapted.get_base_model().model.layers[0].self_attn.q1_proj.base_layer.weight
        return tensors

    monkeypatch.setattr(merge, "merged_tensors", wrong)
    assert states(tmp_path)[MERGE] == "fails"
