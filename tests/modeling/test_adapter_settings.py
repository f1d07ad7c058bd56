import pytest

from difftune.modeling import DiffTransformerConfig
from difftune.modeling.adapter_settings import AdapterSettings, build_lora_config, projections, resolve_targets

MLP = ["gate_proj", "up_proj", "down_proj"]


def config(attention="diff_v1", **changes):
    return DiffTransformerConfig(hidden_size=32, num_attention_heads=8, attention=attention, **changes)


def lora(settings, attention="diff_v1", **changes):
    return build_lora_config(config(attention, **changes), settings)


@pytest.mark.parametrize(
    ("attention", "preset", "expected"),
    [
        ("diff_v1", "lambda_only", []),
        ("diff_v1", "negative_branch", ["q2_proj", "k2_proj"]),
        ("diff_v1", "attention", ["q1_proj", "q2_proj", "k1_proj", "k2_proj", "v_proj", "o_proj"]),
        ("diff_v1", None, ["q1_proj", "q2_proj", "k1_proj", "k2_proj", "v_proj", "o_proj"]),
        ("diff_v2", "negative_branch", ["q2_proj"]),
        ("diff_v2", "attention", ["q1_proj", "q2_proj", "k_proj", "v_proj", "o_proj"]),
        ("diff_v2", "all_linear", ["q1_proj", "q2_proj", "k_proj", "v_proj", "o_proj", *MLP]),
        ("softmax", "all_linear", ["q_proj", "k_proj", "v_proj", "o_proj", *MLP]),
    ],
)
def test_presets_name_the_projections_of_each_kind(attention, preset, expected):
    assert resolve_targets(config(attention), AdapterSettings(preset=preset)) == expected


def test_targets_are_taken_in_the_order_of_the_model():
    assert resolve_targets(config(), AdapterSettings(targets=["v_proj", "q2_proj"])) == ["q2_proj", "v_proj"]


def test_every_branch_has_its_rank_and_alpha():
    settings = AdapterSettings(rank=4, alpha=8, ranks={"negative": 2, "shared": 3}, alphas={"negative": 5})
    peft = lora(settings)
    ranks = {name: peft.rank_pattern.get(name, peft.r) for name in projections(config())}
    alphas = {name: peft.alpha_pattern.get(name, peft.lora_alpha) for name in projections(config())}
    assert [ranks[name] for name in ("q1_proj", "k1_proj", "q2_proj", "k2_proj", "v_proj", "o_proj")] == [
        4,
        4,
        2,
        2,
        3,
        3,
    ]
    assert [alphas[name] for name in ("q1_proj", "k1_proj", "q2_proj", "k2_proj", "v_proj", "o_proj")] == [
        8,
        8,
        5,
        5,
        8,
        8,
    ]


def test_modules_trained_whole_are_those_that_the_model_has():
    assert lora(AdapterSettings()).modules_to_save == ["lambda_full"]
    assert lora(AdapterSettings(train_lambda=False)).modules_to_save is None
    assert lora(AdapterSettings(), "softmax").modules_to_save is None
    norms = AdapterSettings(train_lambda=False, train_norms=True)
    assert "subln" in lora(norms).modules_to_save
    assert lora(norms, subln="plain").modules_to_save == lora(norms, "diff_v2").modules_to_save
    assert {"q_norm", "k_norm"} <= set(lora(norms, qk_norm=True).modules_to_save)
    embeddings = AdapterSettings(train_lambda=False, train_embeddings=True)
    assert lora(embeddings).modules_to_save == ["embed_tokens", "lm_head"]
    tied = lora(embeddings, tie_word_embeddings=True)
    assert tied.modules_to_save == ["embed_tokens"] and tied.ensure_weight_tying


@pytest.mark.parametrize(
    ("settings", "attention", "message"),
    [
        (
            AdapterSettings(targets=["q2_porj"]),
            "diff_v1",
            "'q2_porj' is no projection of a diff_v1 model; did you mean 'q2_proj'",
        ),
        (
            AdapterSettings(targets=["k2_proj"]),
            "diff_v2",
            "'k2_proj' is no projection of a diff_v2 model; did you mean 'k_proj'",
        ),
        (AdapterSettings(preset="atention"), "diff_v1", "'atention' is unknown; did you mean 'attention'"),
        (AdapterSettings(preset="attention", targets=["q1_proj"]), "diff_v1", "exclude one another"),
        (AdapterSettings(preset="negative_branch"), "softmax", "matches nothing: a softmax model has no negative map"),
        (AdapterSettings(train_lambda=True), "softmax", "matches nothing: a softmax model has no lambda"),
        (AdapterSettings(preset="lambda_only", train_lambda=False), "diff_v1", "would train nothing"),
        (AdapterSettings(preset="lambda_only"), "softmax", "would train nothing"),
        (AdapterSettings(rank=0), "diff_v1", "rank of q1_proj must be an integer of at least 1, got 0"),
        (AdapterSettings(ranks={"negative": 0}), "diff_v1", "rank of q2_proj must be an integer of at least 1, got 0"),
        (AdapterSettings(rank=2.5), "diff_v1", "must be an integer"),  # type: ignore[arg-type]
        (AdapterSettings(alpha=0), "diff_v1", "alpha of q1_proj must be greater than 0"),
        (AdapterSettings(alphas={"shared": float("nan")}), "diff_v1", "alpha of v_proj must be greater than 0"),
        (AdapterSettings(ranks={"negativ": 2}), "diff_v1", "branch 'negativ' is unknown; did you mean 'negative'"),
        (
            AdapterSettings(preset="negative_branch", ranks={"positive": 2}),
            "diff_v1",
            "no target is of branch 'positive'",
        ),
        (AdapterSettings(preset="lambda_only", alphas={"shared": 2}), "diff_v1", "no target is of branch 'shared'"),
        (AdapterSettings(dropout=1.0), "diff_v1", r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings, attention, message):
    with pytest.raises(ValueError, match=message):
        lora(settings, attention)
