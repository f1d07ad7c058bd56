import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import difftune
from difftune.checkpoints.export import export_model
from difftune.checkpoints.load import load_model
from difftune.checkpoints.remote_code import AUTO_MAP, remote_code, write_remote_code
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from tests.checkpoints.conftest import SIZE

PACKAGE = Path(difftune.__file__).parent
KINDS = {
    "diff_v1": {"attention": "diff_v1"},
    "diff_v2": {"attention": "diff_v2", "tie_word_embeddings": True, "qk_norm": True},
    "softmax": {"attention": "softmax", "attention_bias": True},
}
READER = """
import sys
sys.modules["difftune"] = None  # importing it is an error
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

class Pretended(torch.Tensor):
    is_cuda = True

for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    given = torch.load(folder + "/given.pt")
    with torch.no_grad():
        logits = model(input_ids=given["tokens"], use_cache=False).logits
        hidden = AutoModel.from_pretrained(folder, trust_remote_code=True)(given["tokens"]).last_hidden_state
        backward = model(input_ids=given["tokens"], labels=given["tokens"]).loss
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    cached = model.generate(**given["prompt"], use_cache=True, **options)
    uncached = model.generate(**given["prompt"], use_cache=False, **options)
    ops = sys.modules[type(model).__module__.rpartition(".")[0] + ".difftune_ops_diff_attention"]
    # What `auto` chooses on a GPU, without one.
    q, kv = torch.randn(1, 5, 4, 2, 8), torch.randn(1, 5, 4, 2, 8)
    lam = torch.tensor(0.5)
    fused = ops.diff_attention(q.as_subclass(Pretended), kv, kv[..., 0, :], lam)
    assert torch.equal(fused, ops.diff_attention(q, kv, kv[..., 0, :], lam, backend="sdpa"))
    said = None
    if hasattr(ops, "load_kernels"):
        try:
            ops.load_kernels()
        except ImportError as error:
            said = str(error)
    model.save_pretrained(folder + "-again")
    again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
    with torch.no_grad():
        kept = torch.equal(again(input_ids=given["tokens"], use_cache=False).logits, logits)
    torch.save(
        {"logits": logits, "hidden": hidden, "loss": backward, "cached": cached, "uncached": uncached,
         "module": type(model).__module__, "kept": kept, "said": said},
        folder + "/found.pt",
    )
assert not [name for name in sys.modules if name.split(".")[0] == "difftune" and sys.modules[name] is not None]
"""


def given():
    tokens = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0  # padding on the left, as `generate` has it
    return {"tokens": tokens, "prompt": {"input_ids": tokens, "attention_mask": mask}}


def read_elsewhere(folders, tmp_path):
    """What a fresh process without difftune finds in the folders."""
    (tmp_path / "reader.py").write_text(READER)
    for folder in folders:
        torch.save(given(), folder / "given.pt")
    # Isolated from the working directory; an installed difftune is barred by the program itself.
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    others = os.pathsep.join(path for path in paths if not (Path(path) / "difftune").is_dir())
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": others}
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", str(tmp_path / "reader.py")]
    done = subprocess.run(
        [*command, *map(str, folders)], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / "found.pt") for folder in folders]


KERNELS = """

from difftune.ops import fused_below  # a module below the room is copied


def load_kernels():
    from difftune.ops.kernels import forward

    return forward.fused


def _has_kernels():
    try:
        from difftune.ops.kernels.forward import fused
    except ImportError:
        return False
    return True


_choose = choose_backend


def choose_backend(backend, q, *more):
    return "kernels" if backend == "auto" and _has_kernels() else _choose(backend, q, *more)
"""


def package_with_kernels(tmp_path):
    """Our sources with a package below ops, which is imported as backends are: in a function, when it is asked for."""
    package = tmp_path / "difftune"
    for room in ("ops", "modeling"):
        shutil.copytree(PACKAGE / room, package / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PACKAGE / "__init__.py", package)
    (package / "ops" / "kernels").mkdir()
    (package / "ops" / "kernels" / "__init__.py").write_text("import a_library_that_is_not_here\n")
    (package / "ops" / "kernels" / "forward.py").write_text("def fused(): ...\n")
    (package / "ops" / "fused_below.py").write_text("import torch\n")
    with (package / "ops" / "diff_attention.py").open("a") as file:
        file.write(KERNELS)
    return package


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Models by name, and what a fresh process without difftune finds in their folders: one process for all."""
    tmp_path = tmp_path_factory.mktemp("remote")
    models, folders = {}, {}
    for name, changes in {**KINDS, "kernels": KINDS["diff_v2"]}.items():
        torch.manual_seed(0)
        models[name] = DiffTransformerForCausalLM(DiffTransformerConfig(**SIZE, **changes)).eval()
        folders[name] = tmp_path / f"{name}.model"
        export_model(models[name], None, folders[name], format="difftune")
    for name, text in remote_code(package_with_kernels(tmp_path)).items():
        (folders["kernels"] / name).write_text(text)
    found = read_elsewhere(list(folders.values()), tmp_path)
    return {name: (models[name], one) for name, one in zip(folders, found, strict=True)}


@pytest.mark.parametrize("kind", [*KINDS, "kernels"])
def test_a_process_without_difftune_computes_the_same_and_generates_with_the_cache(read, kind):
    model, found = read[kind]
    asked = given()
    with torch.no_grad():
        ours = model(input_ids=asked["tokens"], use_cache=False).logits
        hidden = model.model(asked["tokens"]).last_hidden_state
        loss = model(input_ids=asked["tokens"], labels=asked["tokens"]).loss
        texts = model.generate(**asked["prompt"], do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert found["module"].startswith("transformers_modules.")
    assert torch.equal(found["logits"], ours) and torch.equal(found["hidden"], hidden)
    assert torch.equal(found["loss"], loss)
    assert torch.equal(found["cached"], texts) and torch.equal(found["uncached"], texts)
    assert found["kept"], "saved again, it did not come back"


def test_kernels_stay_behind_and_say_so_when_they_are_asked_for(read, tmp_path):
    files = remote_code(package_with_kernels(tmp_path))
    assert not [name for name in files if "kernels" in name] and "difftune_ops_fused_below.py" in files
    assert read["diff_v2"][1]["said"] is None
    assert "modelling code has no difftune.ops.kernels.forward: install difftune" in read["kernels"][1]["said"]


def test_the_files_are_our_sources_with_other_imports():
    files = remote_code()
    assert {"modeling_difftune.py", "configuration_difftune.py"} <= files.keys()
    assert {f"{reference.split('.')[0]}.py" for reference in AUTO_MAP.values()} <= files.keys()
    for name, text in files.items():
        header, body = text.split("\n\n", 1)
        first = header.splitlines()[0]
        assert first.startswith(f"# Generated by difftune {difftune.__version__} from difftune/"), name
        assert "SPDX-License-Identifier: Apache-2.0" in header
        source = (PACKAGE.parent / first.split(" from ")[1].split(":")[0]).read_text()
        assert without_our_imports(body) == without_our_imports(source), name


def without_our_imports(text):
    """The syntax tree of a module, but for imports of our own modules."""

    class Remover(ast.NodeTransformer):
        def visit_ImportFrom(self, node):
            return None if node.level or node.module.split(".")[0] == "difftune" else node

        def visit_Raise(self, node):
            return None if "this copy of difftune's modelling code" in ast.unparse(node) else node

    return ast.dump(Remover().visit(ast.parse(text)))


def test_the_files_import_nothing_else_of_ours_and_no_optional_library():
    allowed = {*sys.stdlib_module_names, "torch", "transformers", "numpy", "huggingface_hub"}
    files = remote_code()
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed, f"{name}: {node.module}"
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1
                needed = [node.module] if node.module else [alias.name for alias in node.names]
                assert {f"{module}.py" for module in needed} <= files.keys(), name


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("from difftune.ops.kernels import forward", "difftune.ops.kernels.forward must be imported inside a function"),
        ("import difftune.ops.sdpa", "to be flattened"),
    ],
)
def test_what_cannot_be_flattened_is_an_error(tmp_path, statement, message):
    package = package_with_kernels(tmp_path)
    path = package / "ops" / "rotary.py"
    path.write_text(f"{path.read_text()}\n\n{statement}\n")
    with pytest.raises(ValueError, match=message):
        remote_code(package)


def test_where_difftune_is_its_own_class_is_taken_and_the_map_does_not_travel(make_model, tmp_path):
    export_model(make_model(), None, tmp_path / "model", format="difftune")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"] == AUTO_MAP
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(loaded) is DiffTransformerForCausalLM
    # A training checkpoint holds the config, and no code.
    assert "auto_map" not in load_model(tmp_path / "model").config.to_dict()


def test_a_foreign_folder_is_refused(make_model, tmp_path):
    export_model(make_model(), None, tmp_path / "model", format="diffllama")
    with pytest.raises(ValueError, match="model_type 'diffllama': only a difftune model has this code"):
        write_remote_code(tmp_path / "model")
