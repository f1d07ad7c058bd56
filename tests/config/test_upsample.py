import pytest

from difftune.config import load_config

BASE = ["data.train=[{path: a.jsonl}]", "tokenizer=bytes", "trainer.max_steps=1"]


def test_upsampling_is_off_until_it_is_asked_for():
    assert load_config(None, BASE).data.upsample is None
    upsample = load_config(None, [*BASE, "data.upsample.share=0.5"]).data.upsample
    assert (upsample.min_tokens, upsample.share) == (4096, 0.5)


@pytest.mark.parametrize("value", ["0", "1.0"])
def test_a_share_of_nothing_or_all_is_refused(value):
    with pytest.raises(ValueError, match=r"data\.upsample\.share must be"):
        load_config(None, [*BASE, f"data.upsample.share={value}"])


def test_packed_rows_must_be_cut_evenly():
    shared = [*BASE, "trainer.context_parallel_size=2"]
    with pytest.raises(ValueError, match=r"data\.seq_len: 1026 must be a multiple of 4"):
        load_config(None, [*shared, "data.seq_len=1026"])
    assert load_config(None, [*shared, "data.seq_len=1026", "data.packing=false"])


def test_devices_that_share_a_layer_do_not_share_rows():
    both = ["trainer.context_parallel_size=2", "trainer.strategy=fsdp", "trainer.fsdp.tensor_parallel_size=2"]
    with pytest.raises(ValueError, match=r"set one of the two to 1"):
        load_config(None, [*BASE, *both])


def test_rows_that_a_teacher_reads_are_not_shared():
    with pytest.raises(ValueError, match="2 devices cannot share the rows that a teacher reads"):
        load_config(None, [*BASE, "trainer.context_parallel_size=2", "distill.teacher=big"])


def test_an_extension_survives_a_model_that_is_named_on_the_command_line(tmp_path):
    recipe = tmp_path / "long.yaml"
    context = "rope_parameters: {rope_type: default, rope_theta: 640000.0}, max_position_embeddings: 65536"
    rest = "data: {train: [{path: a.jsonl}]}\ntrainer: {max_steps: 1}\n"
    recipe.write_text(f"model: {{path: '???', {context}}}\n{rest}")
    kept = load_config(recipe, ["model.path=some-model"]).model.architecture()
    assert kept["max_position_embeddings"] == 65536 and kept["rope_parameters"]["rope_theta"] == 640000.0
    recipe.write_text(f"model: {{path: '???', hidden_size: 64, {context}}}\n{rest}")
    assert load_config(recipe, ["model.path=some-model"]).model.architecture() == {}
