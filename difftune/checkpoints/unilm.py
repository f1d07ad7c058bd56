"""Microsoft's layout of DIFF V1 (microsoft/unilm, Diff-Transformer): read a checkpoint in it, write our model in it.

That repository publishes the attention module and no decoder around it. So the attention's tensors have its names here,
and everything else has Llama's; ``_OUTSIDE`` and ``_LAYER`` below are the whole list. A checkpoint of another decoder
has to be renamed to it first. Its ``config.json`` is described in ``unilm_config.py``.

Both directions are permutations of rows, hence exact. A norm without weight is written with a weight of ones.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from difftune.checkpoints.folders import check_names, check_tied_head, read_json, resolve_folder
from difftune.checkpoints.layouts import (
    adjacent_to_half_rotary,
    half_to_adjacent_rotary,
    join_interleaved_pair,
    require_whole_lambda,
    split_interleaved_pair,
)
from difftune.checkpoints.shards import STATE_DICT_SUFFIXES, LazyTensors, require_usable, write_shards
from difftune.checkpoints.streams import EMBEDDING, HEAD, NORM
from difftune.checkpoints.unilm_config import (
    REQUIRED_FIELDS,
    UNILM_MODEL_TYPE,
    config_from_unilm,
    config_to_unilm,
)
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from difftune.modeling.lambdas import WARMUP_STEP

# Outside the layers the names are the same in both layouts.
_OUTSIDE = (EMBEDDING, NORM, HEAD)
# Below model.layers.{i}: the foreign name -> ours; two of ours are the members of a pair.
_LAYER: dict[str, tuple[str, ...]] = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attn.q_proj.weight": ("self_attn.q1_proj.weight", "self_attn.q2_proj.weight"),
    "self_attn.k_proj.weight": ("self_attn.k1_proj.weight", "self_attn.k2_proj.weight"),
    "self_attn.v_proj.weight": ("self_attn.v_proj.weight",),
    "self_attn.out_proj.weight": ("self_attn.o_proj.weight",),
    "self_attn.lambda_q1": ("self_attn.lambda_full.lambda_q1",),
    "self_attn.lambda_k1": ("self_attn.lambda_full.lambda_k1",),
    "self_attn.lambda_q2": ("self_attn.lambda_full.lambda_q2",),
    "self_attn.lambda_k2": ("self_attn.lambda_full.lambda_k2",),
    "self_attn.subln.weight": ("self_attn.subln.weight",),
    "post_attention_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.gate_proj.weight": ("mlp.gate_proj.weight",),
    "mlp.up_proj.weight": ("mlp.up_proj.weight",),
    "mlp.down_proj.weight": ("mlp.down_proj.weight",),
}
_SUBLN = "self_attn.subln.weight"
_O_PROJ = "self_attn.o_proj.weight"


def read_unilm(source: str | Path) -> tuple[DiffTransformerConfig, Iterator[tuple[str, torch.Tensor]]]:
    """Open a checkpoint in Microsoft's layout; its tensors come one by one under our names, in our layout.

    Config, names and shapes are checked before this returns; each tensor when it comes.

    Args:
        source: A folder or hub id with config.json and safetensors (one file or shards), or a state dict file
            (.safetensors, .pt, .pth, .bin) with config.json beside it.

    Returns:
        Our config (``diff_v1``, sublayer norm ``affine``), and an iterator of name and tensor that holds one foreign
        tensor at a time.

    Raises:
        ValueError: If config.json is missing or has a missing, unknown or impossible field, a tensor is missing, extra
            or misshapen (named), or while iterating, a tensor is quantised or holds NaN.

    Source:
        microsoft/unilm ``Diff-Transformer/multihead_flashdiff_2.py`` (the file without flash attention repeats keys
        before it pairs them: another model, where key/value heads are shared); arXiv:2410.05258, Eq. (1) to (3).

    Example:
        >>> config, tensors = read_unilm("microsoft-diff-3b")  # doctest: +SKIP
    """
    path = Path(source).expanduser()
    if not (path.is_file() and path.suffix in STATE_DICT_SUFFIXES):
        path = resolve_folder(source)
    config_path = (path.parent if path.is_file() else path) / "config.json"
    if not config_path.is_file():
        raise ValueError(
            f"{config_path} does not exist, and tensors do not tell everything: write one with "
            f'"model_type": "{UNILM_MODEL_TYPE}", {", ".join(REQUIRED_FIELDS)}, num_kv_heads where it differs from '
            "num_heads, and tie_word_embeddings if there is no lm_head.weight"
        )
    config = config_from_unilm(read_json(config_path), where=str(config_path))
    return config, tensors_from_unilm(LazyTensors(path), config, source=str(path))


def write_unilm(
    config: DiffTransformerConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    folder: str | Path,
    *,
    max_shard_bytes: int = 2 * 1024**3,
) -> None:
    """Write config.json and weights of one of our V1 models in Microsoft's layout.

    Args:
        config: Ours.
        tensors: Name and tensor, as from ``model.state_dict().items()``, in any order; members of a pair that stand
            apart are held until they meet.
        folder: Made if absent. Not atomic: on an error, files written so far stay.
        max_shard_bytes: Largest weight file.

    Raises:
        ValueError: If the layout cannot express the model (every reason, before anything is written), or a tensor is
            missing, extra, misshapen, quantised or not finite.

    Source:
        microsoft/unilm ``Diff-Transformer/multihead_flashdiff_2.py``.

    Example:
        >>> write_unilm(model.config, model.state_dict().items(), "out")  # doctest: +SKIP
    """
    fields = config_to_unilm(config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(tensors_to_unilm(tensors, config), folder, max_shard_bytes=max_shard_bytes)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def tensors_from_unilm(
    foreign: Mapping[str, torch.Tensor], config: DiffTransformerConfig, *, source: str = "the state dict"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Our tensors, layer after layer, each foreign one read once. Exact: permutations of rows.

    Args:
        foreign: Tensor by Microsoft's name; may read lazily.
        config: Ours, from :func:`difftune.checkpoints.unilm_config.config_from_unilm`.
        source: Where they are from, for messages.

    Returns:
        Our name and the tensor in its dtype; lambda in float32 at least. A tied ``lm_head.weight`` is left out.

    Raises:
        ValueError: If a tensor is missing, extra or misshapen, or a tied head differs from the embedding; while
            iterating, if one is quantised or not finite.

    Source:
        microsoft/unilm ``Diff-Transformer/multihead_flashdiff_2.py``.

    Example:
        >>> ours = dict(tensors_from_unilm(state_dict, config))  # doctest: +SKIP
    """
    if isinstance(foreign, LazyTensors):  # which knows the shapes without reading
        shapes = foreign.shapes()
    else:
        shapes = {name: tensor.shape for name, tensor in foreign.items()}
    expected = _foreign_shapes(config)
    if config.tie_word_embeddings and HEAD in shapes:
        check_tied_head(foreign, source=source)
        expected[HEAD] = expected[EMBEDDING]
    try:
        check_names(shapes, expected, source=source, expected_by="Microsoft's layout")
    except ValueError as error:
        raise ValueError(
            f"{error}; this layout has Microsoft's names in the attention, without biases, and Llama's around it: "
            "rename yours to those"
        ) from error
    _check_shapes(shapes, expected, source)
    return _our_tensors(foreign, config, source)


def tensors_to_unilm(
    ours: Iterable[tuple[str, torch.Tensor]], config: DiffTransformerConfig, *, source: str = "the model"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield Microsoft's tensors from ours, in the order in which they are complete. Exact: permutations of rows.

    Args:
        ours: Our name and tensor, in any order.
        config: Of the model; :func:`config_to_unilm` must accept it.
        source: Where the tensors are from, for messages.

    Yields:
        Microsoft's name and the tensor, on the CPU in its dtype; lambda in float32 at least. A norm without weight
        comes as ones. A tied ``lm_head.weight`` is left out.

    Raises:
        ValueError: If a tensor is extra, misshapen, quantised or not finite, or lambda is in the middle of a warm-up;
            after the last, if one is missing.

    Source:
        microsoft/unilm ``Diff-Transformer/multihead_flashdiff_2.py``.

    Example:
        >>> foreign = dict(tensors_to_unilm(model.state_dict().items(), model.config))  # doctest: +SKIP
    """
    expected = _our_shapes(config)
    foreign_name = {part: (name, parts) for name, parts in _LAYER.items() for part in parts}
    seen: set[str] = set()
    waiting: dict[str, torch.Tensor] = {}
    for name, given in ours:
        if name == HEAD and config.tie_word_embeddings:
            continue
        if name not in expected:
            check_names([name], [], source=source, expected_by="its config")
        _check_shapes({name: given.shape}, {name: expected[name]}, source)
        seen.add(name)
        tensor = require_usable(name, given.detach().cpu(), source)
        if name in _OUTSIDE:
            yield name, tensor
            continue
        if name.endswith(WARMUP_STEP):
            require_whole_lambda(name, tensor, config)
            continue
        prefix, leaf = _split_name(name)
        target, parts = foreign_name[leaf]
        if "lambda" in target:
            tensor = _float32_at_least(tensor)
        if len(parts) == 1:
            yield prefix + target, tensor
            if leaf == _O_PROJ and config.subln == "plain":
                yield prefix + _SUBLN, tensor.new_ones(config.value_head_dim)
            continue
        waiting[name] = tensor
        if all(prefix + part in waiting for part in parts):
            first, second = (waiting.pop(prefix + part) for part in parts)
            fused = join_interleaved_pair(first, second, _num_pairs(target, config))
            yield prefix + target, half_to_adjacent_rotary(fused, _head_dim(config))
    check_names(seen, expected, source=source, expected_by="its config")


def _our_tensors(
    foreign: Mapping[str, torch.Tensor], config: DiffTransformerConfig, source: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """What :func:`tensors_from_unilm` returns, once names and shapes are right."""

    def fetch(name: str) -> torch.Tensor:
        return require_usable(name, foreign[name], source)

    yield EMBEDDING, fetch(EMBEDDING)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for name, ours in _LAYER.items():
            tensor = fetch(prefix + name)
            parts: tuple[torch.Tensor, ...] = (tensor,)
            if len(ours) == 2:
                halves = adjacent_to_half_rotary(tensor, _head_dim(config))
                parts = split_interleaved_pair(halves, _num_pairs(name, config))
            elif "lambda" in name:
                parts = (_float32_at_least(tensor),)
            for our_name, part in zip(ours, parts, strict=True):
                yield prefix + our_name, part
    yield NORM, fetch(NORM)
    if not config.tie_word_embeddings:
        yield HEAD, fetch(HEAD)


def _float32_at_least(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _head_dim(config: DiffTransformerConfig) -> int:
    assert config.head_dim is not None
    return config.head_dim


def _num_pairs(foreign_name: str, config: DiffTransformerConfig) -> int:
    """Pairs of heads in a fused projection."""
    return config.num_diff_heads if foreign_name == "self_attn.q_proj.weight" else config.num_kv_groups


def _split_name(name: str) -> tuple[str, str]:
    """``model.layers.{i}.`` and what is below it."""
    model, layers, index, leaf = name.split(".", 3)
    return f"{model}.{layers}.{index}.", leaf


def _our_shapes(config: DiffTransformerConfig) -> dict[str, torch.Size]:
    """Shape by our name; the model's own skeleton is the oracle."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in DiffTransformerForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[HEAD]
    return shapes


def _foreign_shapes(config: DiffTransformerConfig) -> dict[str, torch.Size]:
    """Shape by foreign name."""
    ours = _our_shapes(config)
    shapes = {name: ours[name] for name in _OUTSIDE if name in ours}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for name, parts in _LAYER.items():
            first = ours[prefix + parts[0]]
            shapes[prefix + name] = torch.Size((len(parts) * first[0], *first[1:]))
    return shapes


def _check_shapes(found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size], source: str) -> None:
    """Raise unless tensors of the same names have the same shapes."""
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(
                f"{name} in {source} is {tuple(found[name])}, its config makes it {tuple(shape)}: correct the config"
            )
