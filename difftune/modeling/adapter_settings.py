"""What an adapter is to train, as a user says it, and the same as PEFT says it."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from peft import LoraConfig

from difftune.modeling.configuration import DiffTransformerConfig

BRANCHES = ("positive", "negative", "shared")
"""The two maps of the attention, and what serves both."""

PRESETS = ("lambda_only", "negative_branch", "attention", "all_linear")
"""Names of sets of targets; see :class:`AdapterSettings`."""

LAMBDA = "lambda_full"
EMBEDDINGS = ("embed_tokens", "lm_head")

_QK = {
    "diff_v1": ("q1_proj", "q2_proj", "k1_proj", "k2_proj"),
    "diff_v2": ("q1_proj", "q2_proj", "k_proj"),
    "softmax": ("q_proj", "k_proj"),
}
BRANCH = {"q1_proj": "positive", "k1_proj": "positive", "q2_proj": "negative", "k2_proj": "negative"}
_MLP = ("gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm", "model.norm", "subln", "q_norm", "k_norm")
# What PEFT takes for "LoRA on nothing".
NO_TARGETS = "dummy-target-modules"


@dataclass(frozen=True)
class AdapterSettings:
    """What an adapter trains, and how.

    ===============  ========================================================================
    preset           LoRA on
    ===============  ========================================================================
    lambda_only      nothing: lambda alone
    negative_branch  ``q2_proj`` and, in ``diff_v1``, ``k2_proj``
    attention        every query, key, value and output projection
    all_linear       those, and the gated unit
    ===============  ========================================================================
    """

    preset: str | None = None
    """Targets by name; None: ``attention``, unless ``targets`` are given."""
    targets: list[str] = field(default_factory=list)
    """Projections by name, such as ``[q2_proj, k2_proj, v_proj]``, instead of a preset."""
    rank: int = 16
    """Rank of every projection, unless ``ranks`` says otherwise."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank (rsLoRA: alpha / sqrt(rank)), unless ``alphas`` says otherwise."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Rank by branch: ``positive`` (q1, k1), ``negative`` (q2, k2), ``shared`` (all other projections)."""
    alphas: dict[str, float] = field(default_factory=dict)
    """Alpha by branch."""
    use_rslora: bool = False
    """Scale by the root of the rank (arXiv:2312.03732)."""
    use_dora: bool = False
    """Train the length of each row apart from its direction (arXiv:2402.09353)."""
    dropout: float = 0.0
    """Of the input of LoRA, while training."""
    train_lambda: bool | None = None
    """Train lambda whole. None: if the model has one."""
    train_norms: bool = False
    """Train the gains of all norms."""
    train_embeddings: bool = False
    """Train the embedding and the head, which is much: vocabulary times width."""


def projections(config: DiffTransformerConfig) -> dict[str, str]:
    """The projections that LoRA can adapt, each with its branch.

    Example:
        >>> small = {"hidden_size": 16, "num_attention_heads": 4}
        >>> projections(DiffTransformerConfig(attention="diff_v2", **small))["q2_proj"]
        'negative'
    """
    names = (*_QK[config.attention], "v_proj", "o_proj", *_MLP)
    return {name: BRANCH.get(name, "shared") for name in names}


def resolve_targets(config: DiffTransformerConfig, settings: AdapterSettings) -> list[str]:
    """The projections that the settings name, in the model's order.

    Raises:
        ValueError: If a name is unknown (the nearest one is told), or what is asked for adapts nothing.
    """
    known = projections(config)
    if settings.targets:
        if settings.preset is not None:
            raise ValueError(f"preset={settings.preset!r} and targets={settings.targets} exclude one another: drop one")
        for target in settings.targets:
            if target not in known:
                raise ValueError(
                    f"target {target!r} is no projection of a {config.attention} model{_nearest(target, known)}"
                )
        return [name for name in known if name in settings.targets]
    preset = settings.preset or "attention"
    if preset not in PRESETS:
        raise ValueError(f"adapter preset {preset!r} is unknown{_nearest(preset, PRESETS)}")
    if preset == "lambda_only":
        return []
    if preset == "negative_branch":
        found = [name for name, branch in known.items() if branch == "negative"]
        if not found:
            raise ValueError(
                f"preset='negative_branch' matches nothing: a {config.attention} model has no negative map"
            )
        return found
    return [name for name in known if preset == "all_linear" or name not in _MLP]


def build_lora_config(config: DiffTransformerConfig, settings: AdapterSettings) -> LoraConfig:
    """Translate settings to PEFT's config.

    Raises:
        ValueError: If a target, branch or preset is unknown, a rank or alpha is not positive, a branch is given a rank
            but not adapted, or nothing would be trained.
    """
    targets = resolve_targets(config, settings)
    branches = {name: branch for name, branch in projections(config).items() if name in targets}
    for what, table in (("ranks", settings.ranks), ("alphas", settings.alphas)):
        for branch in table:
            if branch not in BRANCHES:
                raise ValueError(f"{what}: branch {branch!r} is unknown{_nearest(branch, BRANCHES)}")
            if branch not in branches.values():
                raise ValueError(f"{what}: no target is of branch {branch!r}, the targets are {targets or 'none'}")
    ranks = {name: settings.ranks.get(branch, settings.rank) for name, branch in branches.items()}
    alphas = {name: settings.alphas.get(branch, settings.alpha) for name, branch in branches.items()}
    for name in targets:
        rank, alpha = ranks[name], alphas[name]
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(
                f"rank of {name} must be an integer of at least 1, got {rank}: leave {name} out of the targets"
            )
        if not (alpha > 0 and math.isfinite(alpha)):
            raise ValueError(f"alpha of {name} must be greater than 0, got {alpha}: at 0 the adapter does nothing")
    if not 0 <= settings.dropout < 1:
        raise ValueError(f"adapter dropout must be in [0, 1), got {settings.dropout}")
    whole = _whole_modules(config, settings)
    if not targets and not whole:
        raise ValueError("the adapter would train nothing: preset='lambda_only' needs train_lambda")
    return LoraConfig(
        r=settings.rank if targets else 1,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # declared int, used as a number
        target_modules=targets or NO_TARGETS,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != settings.rank},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != settings.alpha},
        lora_dropout=settings.dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        modules_to_save=whole or None,
        ensure_weight_tying=settings.train_embeddings and config.tie_word_embeddings,
    )


def _whole_modules(config: DiffTransformerConfig, settings: AdapterSettings) -> list[str]:
    """Names of the modules that are trained whole."""
    has_lambda = config.attention != "softmax"
    if settings.train_lambda and not has_lambda:
        raise ValueError("train_lambda=true matches nothing: a softmax model has no lambda")
    whole = [LAMBDA] if has_lambda and settings.train_lambda is not False else []
    if settings.train_norms:
        absent = {"subln"} if config.attention != "diff_v1" or config.subln != "affine" else set()
        absent |= set() if config.qk_norm else {"q_norm", "k_norm"}
        whole += [norm for norm in _NORMS if norm not in absent]
    if settings.train_embeddings:
        # A tied head follows the embedding by ensure_weight_tying.
        whole += EMBEDDINGS[:1] if config.tie_word_embeddings else EMBEDDINGS
    return whole


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (known: {', '.join(known)})"
