import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DiffLlamaForCausalLM, LlamaConfig, LlamaForCausalLM

from difftune.checkpoints.adapters import save_adapter
from difftune.checkpoints.convert import convert_checkpoint
from difftune.checkpoints.export import auto_format, export_model
from difftune.checkpoints.load import find_model, load_model, load_teacher, read_architecture
from difftune.checkpoints.sharded import StoredWeights
from difftune.modeling import DiffTransformerForCausalLM
from difftune.modeling.adapter_settings import AdapterSettings
from difftune.modeling.adapters import add_adapter, trained_parameters
from difftune.modeling.quantized import dequantized_weight
from tests.checkpoints.llamas import each_kind, logits, make_llama, token_ids

MakeModel = Callable[..., DiffTransformerForCausalLM]


def test_difftune_folder_is_loaded_to_the_bit(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(attention="diff_v2")
    model.generation_config.temperature = 0.6
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert again.generation_config.temperature == 0.6
    assert not again.training


def test_diffllama_folder_is_recognised(make_diffllama: Callable[..., DiffLlamaForCausalLM], tmp_path: Path) -> None:
    make_diffllama().save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.bfloat16, attention_backend="reference")
    assert isinstance(model, DiffTransformerForCausalLM)
    assert (model.config.attention, model.config.subln, model.dtype) == ("diff_v1", "plain", torch.bfloat16)
    assert model.config.attention_backend == "reference"
    assert model.config._name_or_path == str(tmp_path)


def test_attention_backend_is_as_stored_unless_asked(make_model: MakeModel, tmp_path: Path) -> None:
    make_model(attention_backend="reference").save_pretrained(tmp_path)
    assert load_model(tmp_path).config.attention_backend == "reference"
    assert load_model(tmp_path, attention_backend="sdpa").config.attention_backend == "sdpa"


def test_other_formats_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma3"}')
    with pytest.raises(ValueError, match="model_type 'gemma3', which is not readable; readable are: a difftune folder"):
        load_model(tmp_path)


def test_microsofts_layout_and_bare_files_are_pointed_to_convert(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unilm_diff"}')
    with pytest.raises(ValueError, match=rf"'unilm_diff', .*`difftune convert {tmp_path} --to diff_v1 --out DIR`"):
        load_model(tmp_path)
    for name in ("weights.pt", "weights.safetensors"):
        (tmp_path / name).touch()
        command = rf"`difftune convert {tmp_path / name} --to diff_v1 --out DIR`, and load DIR"
        with pytest.raises(
            ValueError, match=f"is a file, and models are loaded from folders: convert it once, {command}"
        ):
            load_model(tmp_path / name)
    (tmp_path / "config.json").unlink()
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ValueError, match=r"m\.gguf is a file, .*--to diff_v2"):
        load_model(tmp_path / "m.gguf")


def test_folders_without_a_model_are_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json; readable are"):
        load_model(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"it is a run folder: give .*export, or one of .*checkpoints"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_model(tmp_path / "absent")


def test_missing_tensors_of_our_own_format_are_an_error(make_model: MakeModel, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.2.self_attn.lambda_full.lambda_k2"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"1 missing \(model\.layers\.2\.self_attn\.lambda_full\.lambda_k2\)"):
        load_model(tmp_path)


@pytest.fixture
def training_checkpoint(make_model: MakeModel, tmp_path: Path) -> tuple[Path, DiffTransformerForCausalLM]:
    """A checkpoint as training writes it, after one step, and the model that was trained."""
    from lightning.pytorch import Trainer

    from difftune.training.checkpoint_io import AtomicCheckpointIO
    from difftune.training.finetune import FinetuneModule

    model = make_model(tie_word_embeddings=True, attention_backend="reference")
    ids = torch.randint(3, 61, (2, 20))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=tmp_path,
    )
    loader = torch.utils.data.DataLoader([{"input_ids": ids, "labels": ids}], batch_size=None)
    trainer.fit(FinetuneModule(model, lr=1e-2), loader)
    path = tmp_path / "run" / "checkpoints" / "step-00000001"
    trainer.save_checkpoint(path)
    return path, model


def test_training_checkpoint_is_loaded_to_the_bit(
    training_checkpoint: tuple[Path, DiffTransformerForCausalLM],
) -> None:
    path, model = training_checkpoint
    again = load_model(path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.config.attention_backend == "reference"
    assert load_model(path, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"holds training checkpoints: give one of them, such as .*step-00000001"):
        load_model(path.parent)


def test_damaged_training_checkpoint_is_refused(
    training_checkpoint: tuple[Path, DiffTransformerForCausalLM],
) -> None:
    path, _ = training_checkpoint
    content = bytearray((path / "checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is not what its manifest\.json says"):
        load_model(path)


def test_an_adapter_is_merged_into_its_base_alike_for_every_dtype(make_model: MakeModel, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "base")
    adapted = add_adapter(load_model(tmp_path / "base"), AdapterSettings(train_norms=True))
    with torch.no_grad():
        for parameter in trained_parameters(adapted).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(adapted, tmp_path / "adapter")
    merged = load_model(tmp_path / "adapter", attention_backend="reference")
    assert type(merged) is DiffTransformerForCausalLM and not merged.training
    assert merged.config._name_or_path == str(tmp_path / "adapter")
    assert merged.config.attention_backend == "reference"
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, adapted.eval()(tokens).logits, rtol=0, atol=1e-4)
    rounded = load_model(tmp_path / "adapter", dtype=torch.bfloat16).state_dict()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(rounded[name], tensor if "lambda_full" in name else tensor.bfloat16()), name


def test_an_adapter_that_is_damaged_or_without_its_base_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "base")
    save_adapter(add_adapter(load_model(tmp_path / "base"), AdapterSettings()), tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"the base that .*adapter names is not there: .*base does not exist"):
        load_model(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="only LORA is read"):
        load_model(tmp_path / "adapter")


def test_a_teacher_is_ours_or_any_that_transformers_loads(make_model: MakeModel, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "ours")
    assert isinstance(load_teacher(str(tmp_path / "ours"), torch.bfloat16), DiffTransformerForCausalLM)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes)).bfloat16().save_pretrained(tmp_path / "llama")
    assert isinstance(as_stored := load_teacher(str(tmp_path / "llama")), LlamaForCausalLM)
    assert as_stored.dtype == torch.bfloat16
    assert load_teacher(str(tmp_path / "llama"), torch.float32).dtype == torch.float32
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty could not be loaded by transformers: "):
        load_teacher(str(tmp_path / "empty"))


@pytest.mark.parametrize("folder", ["ours", "llama"])
def test_a_teacher_in_4_bits_computes_with_its_rounded_weights(
    make_model: MakeModel, tmp_path: Path, folder: str
) -> None:
    pytest.importorskip("bitsandbytes")
    # Widths and a head dim that bitsandbytes could repack in an evaluation.
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    if folder == "ours":
        make_model(**sizes).save_pretrained(tmp_path)
    else:
        LlamaForCausalLM(LlamaConfig(vocab_size=11, initializer_range=0.2, **sizes)).save_pretrained(tmp_path)
    plain = load_teacher(str(tmp_path), torch.float32)
    packed = load_teacher(str(tmp_path), torch.float32, quantization="nf4")
    layers = {n: module for n, module in packed.named_modules() if type(module).__name__ == "Linear4bit"}
    assert len(layers) >= 7 and all("_proj" in name for name in layers) and not packed.training
    for name, layer in layers.items():
        weight, rounded = plain.get_submodule(name).weight.data, dequantized_weight(layer)
        # Half of the widest gap between two of NF4's values, of a block's largest weight; and its scale is rounded too.
        assert 0 < (weight - rounded).abs().max() < 0.17 * weight.abs().max()
        weight.copy_(rounded)
    with torch.no_grad():
        expected, first, again = (model(input_ids=torch.arange(9)[None]).logits for model in (plain, packed, packed))
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(first, again)


def test_a_teacher_in_4_bits_computes_in_the_stored_dtype(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes)).bfloat16().save_pretrained(tmp_path)
    assert load_teacher(str(tmp_path), quantization="nf4").model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("folder", ["ours", "llama"])
def test_a_teacher_on_the_meta_device_needs_no_weights(make_model: MakeModel, tmp_path: Path, folder: str) -> None:
    model = make_model()
    if folder == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    found = load_teacher(str(tmp_path), device="meta")
    assert type(found) is type(model) and all(parameter.is_meta for parameter in found.parameters())
    assert {n: p.shape for n, p in found.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


@each_kind
def test_the_llama_family_is_read_as_softmax_without_a_conversion(
    tmp_path: Path, model_type: str, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    source = make_llama(model_type, **changes)
    source.save_pretrained(tmp_path / "source")
    with caplog.at_level("INFO", logger="difftune"):
        ours = load_model(tmp_path / "source")
    assert f"({model_type}) is read as softmax attention" in caplog.text
    ids = token_ids(2, 40)
    scale = float(logits(source, ids).abs().max())
    assert ours.config.attention == "softmax" and find_model(tmp_path / "source")[1] == "llama"
    assert (logits(ours, ids) - logits(source, ids)).abs().max() <= 1e-5 * scale
    architecture = read_architecture(tmp_path / "source")
    for name in ("hidden_size", "num_key_value_heads", "head_dim", "qk_norm", "attention_bias", "rope_parameters"):
        assert getattr(architecture, name) == getattr(ours.config, name), name
    # The same weights, a rank's part at a time.
    stored = StoredWeights(tmp_path / "source")
    state = ours.state_dict()
    assert set(stored) <= set(state) and all(torch.equal(stored[name], state[name]) for name in stored)


@each_kind
def test_a_llama_that_was_trained_goes_back_to_where_plain_transformers_loads_it(
    tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    make_llama(model_type, **changes).save_pretrained(tmp_path / "source")
    ours = load_model(tmp_path / "source")
    report = export_model(ours, None, tmp_path / "out", auto_format(ours.config))
    assert report.format == "llama" and report.reloaded_as != "DiffTransformerForCausalLM"
    again = load_model(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))


def test_what_convert_writes_as_a_llama_or_as_softmax_is_read_again(tmp_path: Path) -> None:
    make_llama("llama").save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", "diff_v2", tmp_path / "v2")
    ids = token_ids(2, 20)
    expected = logits(load_model(tmp_path / "source"), ids)
    for to in ("llama", "softmax"):
        for name in ("v2", "source"):
            out = tmp_path / f"{to}-of-{name}"
            assert convert_checkpoint(tmp_path / name, to, out).exact
            ours = load_model(out)
            assert ours.config.attention == "softmax"
            torch.testing.assert_close(logits(ours, ids), expected, rtol=1e-5, atol=1e-5)


def test_what_a_llama_has_and_ours_has_not_is_refused_by_name(tmp_path: Path) -> None:
    make_llama("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    for read in (load_model, read_architecture, StoredWeights):
        with pytest.raises(ValueError, match=r"attention_dropout=0\.1"):
            read(tmp_path)
