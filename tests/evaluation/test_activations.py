import pytest
import torch
from rich.console import Console

from difftune.data.tokenizers import build_tokenizer
from difftune.evaluation.activations import PAPER, ActivationsTask, measure_activations
from difftune.modeling.attention import AttentionContext
from tests.evaluation.scripted import tiny_model

TOKENIZER = build_tokenizer("digits")
TEXT = "3+15-7=11 and 12*12=144; " * 4


def planted(kind: str, logits: float, hidden: float) -> torch.nn.Module:
    """A model without position, whose one token sees logits of one size, and whose layers write one size."""
    model = tiny_model(kind, num_hidden_layers=1, rope_parameters={"rope_type": "default", "rope_theta": 1.0}).eval()
    layer = model.model.layers[0]
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(hidden)
        for name, parameter in layer.named_parameters():
            if name.endswith("_proj.weight") and "lambda" not in name:
                parameter.zero_()
        dim = layer.self_attn.head_dim
        for name in ("q_proj", "k_proj", "q1_proj", "q2_proj", "k1_proj", "k2_proj"):
            projection = getattr(layer.self_attn, name, None)
            if projection is not None:
                # The norm makes ones of the constant embedding: every query and key is (root, 0, 0, ...).
                projection.weight[::dim, 0] = (logits * dim**0.5) ** 0.5
    return model


@pytest.mark.parametrize("kind", ["diff_v1", "diff_v2", "softmax"])
def test_a_known_logit_tensor_has_its_known_figures(kind):
    sample = measure_activations(planted(kind, logits=1.0, hidden=4.0), [[7]])
    assert sample is not None and sample.num_tokens == 1
    assert sample.logits["top_1"] == pytest.approx(1.0, rel=1e-4)
    assert sample.logits["median"] == pytest.approx(1.0, rel=1e-4)
    # 32 channels of the one layer, all of the embedding's size.
    assert sample.hidden["top_1"] == sample.hidden["top_10"] == sample.hidden["median"] == 4.0
    assert "top_100" not in sample.hidden and sample.logits_by_layer == [sample.logits]


@pytest.mark.parametrize("kind", ["diff_v1", "diff_v2", "softmax"])
def test_the_stream_equals_all_logits_and_hidden_states_at_once(kind):
    model = tiny_model(kind).eval()
    rows = [list(range(10, 40)), list(range(50, 75))]
    with torch.no_grad():
        sample = measure_activations(model, rows)
        logits, hidden = everything(model, rows)
    for found, wanted in ((sample.logits, logits), (sample.hidden, hidden)):
        magnitudes = torch.cat(wanted).abs().sort(descending=True).values
        for rank in (1, 2, 3, 10, 100):
            assert found[f"top_{rank}"] == pytest.approx(magnitudes[rank - 1].item(), rel=1e-5)
        assert found["median"] == pytest.approx(magnitudes.median().item(), rel=1e-5)
    for layer in range(2):
        assert sample.hidden_by_layer[layer]["top_1"] == pytest.approx(hidden[layer].abs().max().item(), rel=1e-6)


def everything(model, rows):
    """Logits and hidden states of each layer, from the projections, without the probe."""
    logits, hidden = [[], []], [[], []]
    for row in rows:
        x = model.model.embed_tokens(torch.tensor([row]))
        context = AttentionContext(model.model.rotary_emb(x, position_ids=torch.arange(len(row))[None]))
        for index, layer in enumerate(model.model.layers):
            logits[index].append(logits_of(layer.self_attn, layer.input_layernorm(x), context.rotary))
            x = layer(x, context)
            hidden[index].append(x.flatten())
    return [torch.cat(parts) for parts in logits], [torch.cat(parts) for parts in hidden]


def logits_of(attention, x, rotary):
    names = [("q_proj", "k_proj")] if hasattr(attention, "q_proj") else [("q1_proj", "k1_proj"), ("q2_proj", "k2_proj")]
    cos, sin = (part.float() for part in rotary)
    causal = torch.ones(x.shape[1], x.shape[1]).tril().bool()
    flat = []
    for q_name, k_name in names:
        parts = [getattr(attention, n) if hasattr(attention, n) else attention.k_proj for n in (q_name, k_name)]
        q, k = (part(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in parts)
        q, k = (t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin for t in (q, k))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        flat.append((q @ k.mT * attention.head_dim**-0.5)[:, :, causal].flatten())
    return torch.cat(flat)


def test_the_task_runs_its_one_item_and_prints_the_paper_beside_it():
    task = ActivationsTask("outliers", [TEXT], num_tokens=64, length=16)
    samples = task.run(tiny_model(), TOKENIZER)
    result = task.summarise(samples)
    assert result.complete and result.samples[0].num_tokens == 64
    metrics = result.metrics()
    assert metrics["logits_top_1"] >= metrics["logits_top_100"] >= metrics["logits_median"] > 0
    assert metrics["hidden_top_1"] == max(metrics["hidden_top_1_layer_00"], metrics["hidden_top_1_layer_01"])
    console = Console(width=140, record=True)
    for table in result.tables():
        console.print(table)
    shown = console.export_text()
    assert str(PAPER["diff_v1"]["logits"]["top_1"]) in shown and str(PAPER["softmax"]["hidden"]["top_1"]) in shown
    assert "on 64 tokens" in str(result) and set(result.to_dict()) >= {"logits", "hidden"}


def test_when_the_time_is_over_nothing_is_claimed():
    task = ActivationsTask("outliers", [TEXT])
    asked = iter([False, False, True])
    samples = task.run(tiny_model(), TOKENIZER, should_stop=lambda: next(asked, True))
    result = task.summarise(samples)
    assert samples == [] and not result.complete and result.metrics() == {} and result.to_dict() == {}
    assert "not measured" in str(result)
    with pytest.raises(ValueError, match="no text"):
        ActivationsTask("outliers", [])
