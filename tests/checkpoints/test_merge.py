import copy

import pytest
import torch

from difftune.checkpoints import merge
from difftune.checkpoints.adapters import load_adapter, save_adapter
from difftune.checkpoints.export import export_model
from difftune.checkpoints.load import load_model
from difftune.checkpoints.merge import merge_adapter
from difftune.modeling.adapter_settings import AdapterSettings
from difftune.modeling.adapters import add_adapter, base_tensors
from tests.checkpoints.test_adapters import SETTINGS, logits, train
from tests.tolerances import assert_within_budget


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(
    "changes", [{}, {"attention": "diff_v2"}, {"tie_word_embeddings": True}], ids=["v1", "v2", "tied"]
)
def test_merged_model_computes_what_the_adapter_does_and_leaves_it_alone(make_model, settings, changes):
    adapted = train(add_adapter(make_model(**changes), settings))
    before, base = logits(adapted), {key: t.clone() for key, t in base_tensors(adapted).items()}
    merged, report = merge_adapter(adapted)
    assert (logits(merged) - before).abs().max() <= 2e-5
    # In float64 the forwards do not round, and what is left is the merged weights' own rounding to float32.
    exact = logits(merge.full_precision(adapted, "default").double())
    assert (logits(copy.deepcopy(merged).double()) - exact).abs().max() <= 1e-6 * exact.abs().max()
    assert report.max_abs_difference is not None and report.budget is not None
    assert report.max_abs_difference < report.budget and report.rounding is None
    assert f"{report.max_abs_difference:.2e}" in str(report)
    assert not any("lora" in name or "modules_to_save" in name for name, _ in merged.named_parameters())
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    assert torch.equal(logits(adapted), before)
    assert all(torch.equal(t, base[key]) for key, t in base_tensors(adapted).items())


@pytest.mark.parametrize("use_dora", [False, True])
def test_bfloat16_is_rounded_once_and_stays_within_the_budget(make_model, tmp_path, use_dora):
    make_model().save_pretrained(tmp_path / "base")
    adapted = train(
        add_adapter(load_model(tmp_path / "base", dtype=torch.bfloat16), AdapterSettings(use_dora=use_dora))
    )
    save_adapter(adapted, tmp_path / "adapter")
    merged, report = merge_adapter(adapted)
    assert merged.dtype == torch.bfloat16 and report.rounding is not None and "rounded" in str(report)
    lambdas = {p.dtype for name, p in merged.named_parameters() if "lambda_full" in name}
    assert lambdas == {torch.float32}
    # The truth: the bfloat16 base, and the adapter on it, in float64.
    truth = merge.full_precision(adapted, "default").double()
    assert_within_budget("merged", logits(merged), logits(adapted), logits(truth))
    precise = load_model(tmp_path / "base", dtype=torch.bfloat16).float()
    exact, _ = merge_adapter(load_adapter(precise, tmp_path / "adapter"))
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, exact.state_dict()[name].to(tensor.dtype)), name


def test_merged_model_is_exported_and_loaded_again(make_model, tmp_path):
    adapted = train(add_adapter(make_model(), AdapterSettings(preset="all_linear")))
    merged, _ = merge_adapter(adapted)
    for format in ("difftune", "diffllama"):
        report = export_model(merged, None, tmp_path / format, format=format)
        assert (logits(load_model(report.path)) - logits(adapted)).abs().max() <= 2e-5


def test_the_named_adapter_is_merged_and_not_the_active_one(make_model):
    adapted = train(add_adapter(make_model(), AdapterSettings(), "one"))
    of_a = logits(adapted)
    train(add_adapter(adapted, AdapterSettings(preset="all_linear"), "two"))
    of_b = logits(adapted)
    merged, _ = merge_adapter(adapted, "one")
    torch.testing.assert_close(logits(merged), of_a, rtol=0, atol=2e-5)
    assert torch.equal(logits(adapted), of_b)


def test_wrong_arithmetic_is_found(make_model, monkeypatch):
    adapted = train(add_adapter(make_model(), AdapterSettings()))
    wrong = merge.merged_tensors

    def without_the_last_lambda(model, name, **options):
        key = "model.layers.2.self_attn.lambda_full.lambda_q1"
        return {**wrong(model, name, **options), key: base_tensors(model)[key]}

    monkeypatch.setattr(merge, "merged_tensors", without_the_last_lambda)
    with pytest.raises(ValueError, match="the merged logits differ from the adapter's by"):
        merge_adapter(adapted)
    assert "not verified" in str(merge_adapter(adapted, verify=False)[1])


def test_nan_is_found(make_model):
    adapted = add_adapter(make_model(), AdapterSettings())
    with torch.no_grad():
        adapted.get_base_model().model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="by nan"):
        merge_adapter(adapted)
