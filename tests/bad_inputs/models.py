"""Model folders: a config of wrong types, weights that are cut off, tokenizers and templates that fail, adapters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bad_inputs.case import Case, fit

_GENERATE = ("generate", "--model", "model", "--prompt", "1+1", "--max-new-tokens", "2")
_T = "model/chat_template.jinja"
_MODEL = ("tokenizer=null", "model.path=model")


def _set(file: str, **changes: Any) -> Callable[[Path], object]:
    """Set keys of a JSON file; ... takes one out."""

    def change(work: Path) -> None:
        path = work / file
        content = json.loads(path.read_text())
        content.update({key: value for key, value in changes.items() if value is not ...})
        for key in [key for key, value in changes.items() if value is ...]:
            content.pop(key, None)
        path.write_text(json.dumps(content))

    return change


def _write(file: str, content: str | bytes) -> Callable[[Path], object]:
    def change(work: Path) -> None:
        (work / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def _edit(file: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def change(work: Path) -> None:
        (work / file).write_bytes(edit((work / file).read_bytes()))

    return change


def _remove(file: str) -> Callable[[Path], object]:
    return lambda work: (work / file).unlink()


def _folder(file: str) -> Callable[[Path], object]:
    def change(work: Path) -> None:
        (work / file).unlink()
        (work / file).mkdir()

    return change


def _loop(file: str) -> Callable[[Path], object]:
    def change(work: Path) -> None:
        (work / file).unlink()
        (work / file).symlink_to(Path(file).name)

    return change


def _nan_weights(work: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(work / "model/model.safetensors")
    name = next(name for name in tensors if name.endswith("o_proj.weight"))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, work / "model/model.safetensors", metadata={"format": "pt"})


def _drop_tensor(work: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(work / "model/model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("o_proj.weight"))]
    save_file(tensors, work / "model/model.safetensors", metadata={"format": "pt"})


def _adapter(**changes: Any) -> Callable[[Path], object]:
    return _set("adapter/adapter_config.json", **changes)


def _model(name: str, prepare: Callable[[Path], object], *says: str) -> Case:
    """A damaged model, asked to generate."""
    return Case(name, _GENERATE, ("model", *says), copies=("model",), prepare=prepare)


def _config(name: str, *says: str, **changes: Any) -> Case:
    """A model whose config.json has other values."""
    return _model(f"config.json: {name}", _set("model/config.json", **changes), *says)


def _template(name: str, content: str | bytes, *says: str) -> Case:
    """A chat template that fails, asked to generate."""
    return Case(f"template: {name}", _GENERATE, says, copies=("model",), prepare=_write(_T, content))


def _tokenizer(name: str, prepare: Callable[[Path], object], *says: str) -> Case:
    return _model(f"tokenizer: {name}", prepare, *says)


_HEADER = "model/model.safetensors"

CASES: list[Case] = [
    *(
        Case(f"{command[0]} of a model that is not there", command, ("none",))
        for command in (
            ("generate", "--model", "none", "--prompt", "1"),
            ("evaluate", "--model", "none", "--data", "synthetic:arithmetic"),
            ("export", "none", "--out", "o"),
            ("plan", "model.path=none"),
            ("fit", "--config", "tiny.yaml", "tokenizer=null", "model.path=none"),
        )
    ),
    Case(
        "evaluate a model that is not there into a folder",
        ("evaluate", "--model", "./none", "--data", "synthetic:arithmetic", "--out", "~/results"),
        ("none",),
    ),
    Case("a model on the hub, offline", ("generate", "--model", "some-org/x", "--prompt", "1"), ("some-org/x",)),
    Case("a model named with two slashes", ("generate", "--model", "a/b/c", "--prompt", "1"), ("a/b/c",)),
    Case(
        "a model that is an empty folder",
        ("generate", "--model", "m", "--prompt", "1"),
        ("m", "config.json"),
        prepare=lambda work: (work / "m").mkdir(),
    ),
    Case(
        "a model that is a weight file",
        ("generate", "--model", "model/model.safetensors", "--prompt", "1"),
        ("model.safetensors", "folder"),
        copies=("model",),
    ),
    Case("a model that is a recipe", ("generate", "--model", "tiny.yaml", "--prompt", "1"), ("tiny.yaml",)),
    Case(
        "a run folder as a model",
        ("generate", "--model", "finished", "--prompt", "1"),
        ("finished", "config.json"),
        copies=("finished",),
    ),
    _model("config.json is gone", _remove("model/config.json"), "config.json"),
    _model("config.json is empty", _write("model/config.json", ""), "config.json"),
    _model("config.json is cut off", _edit("model/config.json", lambda data: data[:40]), "config.json"),
    _model("config.json is a list", _write("model/config.json", "[]"), "config.json", "object"),
    _model("config.json is deep", _write("model/config.json", "[" * 100_000), "config.json"),
    _model("config.json is not UTF-8", _write("model/config.json", b"\xff\xfe{}"), "config.json"),
    _model("config.json is a folder", _folder("model/config.json"), "config.json"),
    _model("config.json is a circle of links", _loop("model/config.json"), "config.json"),
    _config("an unknown model_type", "gpt9", model_type="gpt9"),
    _config("a model_type that is a list", "model_type", model_type=["difftune"]),
    _config("no model_type", "model_type", model_type=...),
    _config("a width of text", "hidden_size", hidden_size="wide"),
    _config("a width of null", "hidden_size", hidden_size=None),
    _config("a width of 0", "hidden_size", "0", hidden_size=0),
    _config("a width below 0", "hidden_size", "-32", hidden_size=-32),
    _config("a width that is half", "hidden_size", hidden_size=32.5),
    _config("a width that is a list", "hidden_size", hidden_size=[32]),
    _config("layers of text", "num_hidden_layers", num_hidden_layers="one"),
    _config("layers below 0", "num_hidden_layers", "-1", num_hidden_layers=-1),
    _config("a million layers", "num_hidden_layers", "1000000", num_hidden_layers=1_000_000),
    _config("layers that are true", "num_hidden_layers", num_hidden_layers=True),
    _config("more layers than weights", "missing", num_hidden_layers=2),
    _config("heads of text", "num_attention_heads", num_attention_heads="4"),
    _config("heads of 0", "num_attention_heads", "0", num_attention_heads=0),
    _config("key heads of 0", "num_key_value_heads", "0", num_key_value_heads=0),
    _config("key heads below 0", "num_key_value_heads", "-2", num_key_value_heads=-2),
    _config("another width than the weights", "shape", hidden_size=64),
    _config("another vocabulary than the weights", "shape", vocab_size=200),
    _config("a vocabulary of text", "vocab_size", vocab_size="many"),
    _config("a vocabulary below 0", "vocab_size", "-1", vocab_size=-1),
    _config("an unknown attention", "attention", "diff_v7", attention="diff_v7"),
    _config("an attention that is a number", "attention", attention=1),
    _config("an attention that is a list", "attention", attention=["diff_v1"]),
    _config("an unknown subln", "subln", "strange", subln="strange"),
    _config("an unknown activation", "hidden_act", "magic", hidden_act="magic"),
    _config("an activation that is a number", "hidden_act", hidden_act=3),
    _config("an epsilon of text", "rms_norm_eps", rms_norm_eps="small"),
    _config("an epsilon that is nan", "rms_norm_eps", "nan", rms_norm_eps=float("nan")),
    _config("an epsilon that is infinite", "rms_norm_eps", "inf", rms_norm_eps=float("inf")),
    _config("an epsilon below 0", "rms_norm_eps", "-1", rms_norm_eps=-1.0),
    _config("an epsilon of null", "rms_norm_eps", rms_norm_eps=None),
    _config("a lambda_init of text", "lambda_init", lambda_init="big"),
    _config("a lambda_init that is nan", "lambda_init", "nan", lambda_init=float("nan")),
    _config("a lambda_std_dev below 0", "lambda_std_dev", "-1", lambda_std_dev=-1.0),
    _config("an initializer_range that is nan", "initializer_range", "nan", initializer_range=float("nan")),
    _config("a context of 0", "max_position_embeddings", "0", max_position_embeddings=0),
    _config("a context of text", "max_position_embeddings", max_position_embeddings="long"),
    _config("ties of text", "tie_word_embeddings", tie_word_embeddings="yes"),
    _config("a bias of text", "attention_bias", attention_bias="no"),
    _config("rotary settings as text", "rope_parameters", rope_parameters="yarn"),
    _config("rotary settings as a list", "rope_parameters", rope_parameters=[1]),
    _config("a rope_theta of text", "rope_theta", "abc", rope_parameters={"rope_type": "default", "rope_theta": "abc"}),
    _config("a rope_theta below 0", "rope_theta", "-1", rope_parameters={"rope_type": "default", "rope_theta": -1}),
    _config(
        "a rope_theta that is nan", "rope_theta", rope_parameters={"rope_type": "default", "rope_theta": float("nan")}
    ),
    _config("yarn without a factor", "factor", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
    _config("a rope_type that is a number", "rope_type", rope_parameters={"rope_type": 4, "rope_theta": 1e4}),
    _config("an unknown dtype", "dtype", "float99", dtype="float99"),
    _config("a dtype that is a number", "dtype", dtype=32),
    _config("an eos of text", "eos_token_id", eos_token_id="end"),
    # weights
    _model("weights: gone", _remove(_HEADER), "safetensors"),
    _model("weights: empty", _write(_HEADER, b""), "model.safetensors"),
    _model("weights: cut in half", _edit(_HEADER, lambda data: data[: len(data) // 2]), "model.safetensors", "damaged"),
    _model("weights: one byte short", _edit(_HEADER, lambda data: data[:-1]), "model.safetensors", "damaged"),
    _model("weights: zeros", _edit(_HEADER, lambda data: bytes(len(data))), "model.safetensors"),
    _model(
        "weights: a header without an end", _edit(_HEADER, lambda data: b"\xff" * 8 + data[8:]), "model.safetensors"
    ),
    _model("weights: a text", _write(_HEADER, "hello"), "model.safetensors"),
    _model(
        "weights: a Git LFS pointer",
        _write(_HEADER, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "model.safetensors",
    ),
    _model("weights: a folder", _folder(_HEADER), "model.safetensors"),
    _model("weights: a circle of links", _loop(_HEADER), "model.safetensors"),
    _model("weights: a tensor is gone", _drop_tensor, "missing", "o_proj"),
    _model("weights: nan", _nan_weights, "o_proj", "nan"),
    _model("weights: an index of text", _write("model/model.safetensors.index.json", "hello"), "index.json"),
    _model("weights: an index of a list", _write("model/model.safetensors.index.json", "[]"), "index.json"),
    _model("weights: an index without a map", _write("model/model.safetensors.index.json", "{}"), "index.json"),
    _model(
        "weights: an index that leads outside",
        _write("model/model.safetensors.index.json", json.dumps({"weight_map": {"a": "../../etc/passwd"}})),
        "passwd",
    ),
    _model(
        "weights: an index of numbers",
        _write("model/model.safetensors.index.json", json.dumps({"weight_map": {"a": 3}})),
        "index.json",
    ),
    _model(
        "weights: an index of files that are gone",
        _write("model/model.safetensors.index.json", json.dumps({"weight_map": {"a": "x.safetensors"}})),
        "x.safetensors",
    ),
    # tokenizers and templates
    _tokenizer("gone", lambda work: [path.unlink() for path in (work / "model").glob("tokenizer*")], "tokenizer"),
    _tokenizer("empty", _write("model/tokenizer.json", ""), "tokenizer"),
    _tokenizer("cut off", _edit("model/tokenizer.json", lambda data: data[:100]), "tokenizer"),
    _tokenizer("a list", _write("model/tokenizer.json", "[]"), "tokenizer"),
    _tokenizer("an object of nothing", _write("model/tokenizer.json", "{}"), "tokenizer"),
    _tokenizer("a model that is unknown", _set("model/tokenizer.json", model={"type": "Nope"}), "tokenizer"),
    _tokenizer("not UTF-8", _write("model/tokenizer.json", b"\xff\xfe"), "tokenizer"),
    _tokenizer("a folder", _folder("model/tokenizer.json"), "tokenizer"),
    _tokenizer("a config of text", _write("model/tokenizer_config.json", "hello"), "tokenizer"),
    _tokenizer("a config of a list", _write("model/tokenizer_config.json", "[]"), "tokenizer"),
    _tokenizer("a class that is a number", _set("model/tokenizer_config.json", tokenizer_class=3), "tokenizer"),
    _tokenizer("an eos that is a number", _set("model/tokenizer_config.json", eos_token=3), "tokenizer"),
    _tokenizer("no eos", _set("model/tokenizer_config.json", eos_token=None), "eos"),
    _template("empty", "", "empty"),
    _template("broken", "{% for m in messages %}", "template"),
    _template("raises", "{{ raise_exception('only French') }}", "template", "only French"),
    _template("an undefined name", "{{ nothing.at.all }}", "template"),
    _template("a wrong type", "{{ messages + 1 }}", "template"),
    _template("divides by nothing", "{{ 1 // 0 }}", "template"),
    _template("an unknown filter", "{{ messages | nope }}", "template"),
    _template("calls itself", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "template"),
    _template("reaches into Python", "{{ ''.__class__.__mro__ }}", "template"),
    _template("not UTF-8", b"\xff\xfe", "UTF-8"),
    fit(
        "template: raises in training",
        *_MODEL,
        says=("template", "only French"),
        copies=("model",),
        prepare=_write(_T, "{{ raise_exception('only French') }}"),
    ),
    fit(
        "template: divides by nothing in training",
        *_MODEL,
        says=("template",),
        copies=("model",),
        prepare=_write(_T, "{{ 1 // 0 }}"),
    ),
    Case(
        "template: raises in an evaluation",
        ("evaluate", "--model", "model", "--data", "synthetic:arithmetic", "--limit", "1"),
        ("template", "only French"),
        copies=("model",),
        prepare=_write(_T, "{{ raise_exception('only French') }}"),
    ),
    _model("generation_config.json is text", _write("model/generation_config.json", "hello"), "generation_config.json"),
    _model("generation_config.json is a list", _write("model/generation_config.json", "[]"), "generation_config.json"),
    _model(
        "generation_config.json has an eos of text",
        _write("model/generation_config.json", '{"eos_token_id": "x"}'),
        "eos_token_id",
    ),
    # adapters
    *(
        Case(
            f"adapter: {name}",
            ("merge", "adapter", "--out", "o"),
            ("adapter", *says),
            copies=("adapter", "model"),
            prepare=prepare,
        )
        for name, prepare, says in (
            ("names itself as its base", _adapter(base_model_name_or_path="adapter"), ("itself",)),
            ("names nothing as its base", _adapter(base_model_name_or_path=None), ("--base",)),
            ("names an empty base", _adapter(base_model_name_or_path=""), ("--base",)),
            ("names a number as its base", _adapter(base_model_name_or_path=3), ("base",)),
            ("names a base that is gone", _adapter(base_model_name_or_path="gone"), ("gone",)),
            ("has a rank of text", _adapter(r="two"), ("r",)),
            ("has a rank of 0", _adapter(r=0), ("r",)),
            ("has another rank", _adapter(r=5), ("(5, 32)",)),
            ("has an alpha that is nan", _adapter(lora_alpha=float("nan")), ("alpha",)),
            ("is of another kind", _adapter(peft_type="NOPE"), ("NOPE",)),
            ("is of no kind", _adapter(peft_type=...), ("None", "LORA")),
            ("is for modules that are not there", _adapter(target_modules=["nope_proj"]), ("target_modules",)),
            ("has a config of text", _write("adapter/adapter_config.json", "hello"), ("adapter_config.json",)),
            ("has a config of a list", _write("adapter/adapter_config.json", "[]"), ("adapter_config.json",)),
            (
                "has weights that are cut off",
                _edit("adapter/adapter_model.safetensors", lambda data: data[:-9]),
                ("adapter_model.safetensors",),
            ),
            ("has no weights", _remove("adapter/adapter_model.safetensors"), ("adapter_model.safetensors",)),
        )
    ),
    Case(
        "an adapter that names itself, to generate",
        ("generate", "--model", "adapter", "--prompt", "1"),
        ("adapter", "itself"),
        copies=("adapter", "model"),
        prepare=_adapter(base_model_name_or_path="adapter"),
    ),
    fit(
        "an adapter that names itself, to train on",
        "tokenizer=null",
        "model.path=adapter",
        says=("adapter", "itself"),
        copies=("adapter", "model"),
        prepare=_adapter(base_model_name_or_path="adapter"),
    ),
    Case(
        "an adapter on an adapter that names it",
        ("merge", "adapter", "--out", "o"),
        ("itself",),
        copies=("adapter", "model"),
        prepare=lambda work: (
            _adapter(base_model_name_or_path="second")(work),
            (work / "second").symlink_to("adapter"),
        ),
    ),
    Case(
        "merge onto a base that is an adapter",
        ("merge", "adapter", "--base", "adapter", "--out", "o"),
        ("adapter",),
        copies=("adapter", "model"),
    ),
    Case(
        "export in a format that cannot hold it",
        ("export", "adapter", "--format", "peft", "--base-diffllama", "x", "--out", "o"),
        ("base-diffllama",),
        copies=("adapter", "model"),
    ),
    Case(
        "convert of damaged weights",
        ("convert", "model", "--to", "diffllama", "--out", "o"),
        ("model.safetensors",),
        copies=("model",),
        prepare=_edit(_HEADER, lambda data: data[:-9]),
    ),
    Case(
        "convert of a GGUF of text",
        ("convert", "x.gguf", "--to", "diff_v2", "--out", "o"),
        ("x.gguf",),
        files={"x.gguf": "hello"},
    ),
    Case(
        "convert of a GGUF cut off",
        ("convert", "x.gguf", "--to", "diff_v2", "--out", "o"),
        ("x.gguf",),
        files={"x.gguf": b"GGUF\x03\0\0\0" + bytes(9)},
    ),
    Case(
        "convert of a state dict of text",
        ("convert", "x.pt", "--to", "diff_v2", "--out", "o"),
        ("config.json", "readable"),
        files={"x.pt": "hello"},
    ),
    Case(
        "verify of damaged weights",
        ("verify", "--model", "model"),
        ("model.safetensors",),
        copies=("model",),
        prepare=_edit(_HEADER, lambda data: data[:-9]),
    ),
]
