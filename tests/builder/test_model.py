from dataclasses import replace

import pytest
import torch

from difftune.builder import build_model, build_tokenizer, fresh_architecture
from difftune.config import load_config
from difftune.data.tokenizers import build_tokenizer as build_named_tokenizer
from difftune.modeling.lambdas import warming_up
from difftune.modeling.quantized import quantization_of
from difftune.rendering import DATE_KEY, keep_date, render_chat, template_date
from tests.conftest import ROOT

QUICKSTART = ROOT / "recipes" / "quickstart.yaml"


def load(*overrides):
    return load_config(QUICKSTART, ["data.train.*.options.count=100", *overrides])


def test_a_fresh_model_has_the_vocabulary_and_special_tokens_of_the_tokenizer():
    config = load()
    tokenizer = build_tokenizer(config)
    architecture = fresh_architecture(config.model, tokenizer)
    assert architecture.vocab_size == len(tokenizer)
    assert (architecture.pad_token_id, architecture.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_the_seed_decides_the_weights_of_a_fresh_model():
    config = load()
    tokenizer = build_tokenizer(config)
    first, same, other = (build_model(config.model, tokenizer, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_dtype_and_checkpointing_are_applied_and_lambda_stays_in_float32():
    config = load("model.dtype=bfloat16", "model.gradient_checkpointing=true")
    model = build_model(config.model, build_tokenizer(config), 0)
    dtypes = {("lambda_full" in name, p.dtype) for name, p in model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)} and model.is_gradient_checkpointing


def test_a_loaded_model_is_quantised_in_its_dtype(tmp_path, caplog):
    pytest.importorskip("bitsandbytes")
    config = load()
    tokenizer = build_tokenizer(config)
    build_model(config.model, tokenizer, 0).save_pretrained(tmp_path)
    # The same section, as a run with an adapter has it.
    section = replace(config.model, path=str(tmp_path), quantization="nf4", dtype="bfloat16")
    architecture = {key: None for key in section.architecture()}
    with caplog.at_level("INFO", logger="difftune.builder.model"):
        model = build_model(replace(section, **architecture), tokenizer, 0)
    assert quantization_of(model) == {"type": "nf4", "double_quant": True, "compute_dtype": "bfloat16"}
    assert "projections in 4 bits" in caplog.text


def test_a_loaded_model_takes_another_context(tmp_path):
    config = load()
    tokenizer = build_tokenizer(config)
    build_model(config.model, tokenizer, 0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    longer = load(f"model.path={tmp_path}", "model.max_position_embeddings=4096", "tokenizer=null")
    model = build_model(longer.model, build_tokenizer(longer), 0)
    assert model.config.max_position_embeddings == 4096 and model.config.hidden_size == 128


def test_a_loaded_model_begins_a_warm_up_of_lambda_and_later_stages_go_on_with_it(tmp_path):
    config = load()
    tokenizer = build_tokenizer(config)
    build_model(config.model, tokenizer, 0).save_pretrained(tmp_path / "cold")
    tokenizer.save_pretrained(tmp_path / "cold")
    warm = load(f"model.path={tmp_path / 'cold'}", "model.lambda_warmup_steps=50", "tokenizer=null")
    model = build_model(warm.model, tokenizer, 0)
    for module in warming_up(model):
        module.advance()
    model.save_pretrained(tmp_path / "stage")
    later = build_model(warm.model, tokenizer, 0, start_from=tmp_path / "stage")
    assert {int(module.get_buffer("warmup_step")) for module in warming_up(later)} == {1}
    again = load(f"model.path={tmp_path / 'stage'}", "tokenizer=null")
    assert {int(m.get_buffer("warmup_step")) for m in warming_up(build_model(again.model, tokenizer, 0))} == {1}
    ended = load(f"model.path={tmp_path / 'stage'}", "model.lambda_warmup_steps=0", "tokenizer=null")
    assert not list(warming_up(build_model(ended.model, tokenizer, 0)))


def test_a_fresh_model_can_warm_lambda_up():
    config = load("model.lambda_warmup_steps=50")
    model = build_model(config.model, build_tokenizer(config), 0)
    assert all(float(module()) < 0.8 / 51 + 0.01 for module in warming_up(model)) and list(warming_up(model))


CLOCK = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"


def test_a_template_that_reads_the_clock_reads_one_date_in_all_of_a_run(tmp_path):
    config = load(f"run_dir={tmp_path}")
    config.chat_template = CLOCK
    today = template_date(build_tokenizer(config, of_run=True, write=False))
    assert not list(tmp_path.iterdir())
    # Another process, or `prepare` yesterday, was first.
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "chat_template_date").write_text("2001-02-03\n")
    assert str(template_date(build_tokenizer(config, of_run=True))) == "2001-02-03"
    assert template_date(build_tokenizer(config)) == today
    # What is saved with the run is what it learned.
    (tmp_path / "cache" / "chat_template_date").unlink()
    first = build_tokenizer(config, of_run=True)
    assert (tmp_path / "cache" / "chat_template_date").read_text() == f"{today}\n"
    first.init_kwargs[DATE_KEY] = "2002-03-04"
    first.save_pretrained(tmp_path / "tokenizer")
    resumed = build_tokenizer(config, of_run=True)
    assert render_chat(resumed, [{"role": "user", "content": "1"}]).startswith("04 Mar 2002")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"chat_template_date": "soon"}')
    with pytest.raises(ValueError, match=r"date of the chat template .* cannot be read .*'soon'"):
        build_tokenizer(config, of_run=True)


def test_the_first_of_two_processes_decides_the_date(tmp_path, monkeypatch):
    tokenizer = build_named_tokenizer("bytes", chat_template=CLOCK)
    (tmp_path / "cache").mkdir()

    def late(own, file):
        file.write_text("2001-02-03")
        raise FileExistsError

    monkeypatch.setattr("os.link", late)
    keep_date(tokenizer, tmp_path)
    assert str(template_date(tokenizer)) == "2001-02-03"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["chat_template_date"]


def test_the_chat_template_of_a_recipe_is_the_tokenizers(tmp_path):
    (tmp_path / "my.jinja").write_text("{{ 'mine' }}")
    tokenizer = build_tokenizer(load(f"chat_template={tmp_path / 'my.jinja'}"))
    assert render_chat(tokenizer, [{"role": "user", "content": "1"}]) == "mine"


def test_a_padding_token_that_ends_texts_is_no_padding_to_a_fresh_model():
    config = load()
    tokenizer = build_tokenizer(config)
    tokenizer.pad_token = tokenizer.eos_token
    model = build_model(config.model, tokenizer, 0)
    assert model.get_input_embeddings().padding_idx is None
    assert model.generation_config.pad_token_id == tokenizer.eos_token_id
    assert model.get_input_embeddings().weight[tokenizer.eos_token_id].abs().sum() > 0


def test_a_token_without_a_row_is_refused_with_both_numbers():
    config = load("model.vocab_size=110")
    tokenizer = build_tokenizer(config)
    tokenizer.add_tokens([f"<extra{n}>" for n in range(9)])
    with pytest.raises(ValueError, match=r"the tokenizer has 111 tokens, the model's embedding 110 rows"):
        build_model(config.model, tokenizer, 0)


def test_an_unknown_key_of_the_rotation_is_refused_with_those_that_are_known():
    config = load_config(None, ["tokenizer=digits", "model.rope_parameters={rope_thet: 10}"], command="plan")
    with pytest.raises(ValueError, match=r"unknown key 'rope_thet'; known are rope_type, rope_theta"):
        fresh_architecture(config.model, build_tokenizer(config))
