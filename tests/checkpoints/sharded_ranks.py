"""Models loaded shard by shard on several ranks, compared with the ones that a single process loads."""

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from difftune.checkpoints.adapters import base_record
from difftune.checkpoints.load import load_model
from difftune.checkpoints.sharded import FreshWeights, fill_model, load_skeleton, weightless_projections
from difftune.modeling import DiffTransformerForCausalLM
from difftune.modeling.adapter_settings import AdapterSettings
from difftune.modeling.adapters import add_adapter
from difftune.training.sharding import shard_model
from tests.training.scale_ranks import fresh_skeleton, tiny_model, whole

ADAPTERS = {
    "plain": None,
    "attention": AdapterSettings(rank=3),
    "everything": AdapterSettings(preset="all_linear", rank=2, train_norms=True, train_embeddings=True),
}


def adapt(model, adapter, weights=None):
    if ADAPTERS[adapter] is not None:
        torch.manual_seed(5)
        with nullcontext() if weights is None else weightless_projections(model, weights):
            add_adapter(model, ADAPTERS[adapter])


def differences(sharded, one):
    """Everything in which two models differ, by name."""
    found = {n: whole(t) for n, t in (*sharded.named_parameters(remove_duplicate=False), *sharded.named_buffers())}
    expected = dict((*one.named_parameters(remove_duplicate=False), *one.named_buffers()))
    problems = sorted(found.keys() ^ expected.keys())
    for name, tensor in found.items():
        same = name in expected and tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])
        problems += [] if same else [name]
    trained = [{n for n, p in model.named_parameters() if p.requires_grad} for model in (sharded, one)]
    return problems + sorted(trained[0] ^ trained[1])


def compare(mesh, build_skeleton, build_one, adapter):
    """Load both ways; say what differs, which parameters are sharded, and whether tied weights still are."""
    model, weights = build_skeleton()
    is_stored = not isinstance(weights, FreshWeights)
    model.weights_on_disk = weights
    adapt(model, adapter, weights if is_stored else None)
    record = base_record(model) if is_stored else None
    shard_model(model, mesh)
    fill_model(model, weights, "cpu")
    one = build_one()
    adapt(one, adapter)
    problems = differences(model, one)
    if record is not None:
        problems += [] if record == base_record(one) == base_record(model) else ["base_record"]
    ids = torch.arange(14)[None] % one.config.vocab_size
    with torch.no_grad():
        error = (model(input_ids=ids).logits - one(input_ids=ids).logits).abs().max().item()
    model.reshard()
    return {
        "differing": problems,
        "sharded": sum(isinstance(p, DTensor) for p in model.parameters()),
        "logits": error,
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
    }


def fresh(config):
    torch.manual_seed(11)
    return DiffTransformerForCausalLM(config)


def main(arguments):
    """``FOLDER``, with a model in each folder ``models/*``: load each with every kind of adapter."""
    folder = Path(arguments[0])
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh(
        "cpu", (torch.distributed.get_world_size(), 1), mesh_dim_names=("data_parallel", "tensor_parallel")
    )
    results = {}
    for path in sorted((folder / "models").iterdir()):
        dtype = torch.bfloat16 if path.name.endswith("bf16") else torch.float32
        for adapter in ADAPTERS:
            print(path.name, adapter, flush=True)
            load = partial(load_skeleton, path, dtype=dtype)
            results[f"{path.name}-{adapter}"] = compare(mesh, load, partial(load_model, path, dtype=dtype), adapter)
    for tied in (True, False):
        config = tiny_model(tie_word_embeddings=tied, num_hidden_layers=2).config
        name = "tied" if tied else "untied"
        results[f"fresh-{name}"] = compare(mesh, partial(fresh_skeleton, config, 11), partial(fresh, config), "plain")
    if torch.distributed.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
