"""The keys of `adapter` in a recipe; metadata holds the constraints, as `_key` of config.py writes them."""

from dataclasses import dataclass, field


@dataclass
class AdapterConfig:
    """A few parameters to train beside a frozen model: low-rank updates (LoRA) of projections, and lambda whole."""

    preset: str | None = field(
        default=None, metadata={"choices": ("lambda_only", "negative_branch", "attention", "all_linear")}
    )
    """LoRA on nothing (lambda alone); q2_proj and k2_proj; every query, key, value and output projection; those
    and the gated unit. null: `attention`, unless `targets` are given."""
    targets: list[str] = field(default_factory=list)
    """Projections by name, such as [q2_proj, k2_proj, v_proj], instead of a preset."""
    rank: int = field(default=16, metadata={"low": 1})
    """Rank of every projection, unless `ranks` says otherwise."""
    alpha: float = field(default=32.0, metadata={"above": 0})
    """The update is scaled by alpha / rank, unless `alphas` says otherwise."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Rank by branch, such as {negative: 8}: `positive` (q1, k1), `negative` (q2, k2), `shared` (all others)."""
    alphas: dict[str, float] = field(default_factory=dict)
    """Alpha by branch."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    use_dora: bool = False
    """Train the length of each row apart from its direction."""
    dropout: float = field(default=0.0, metadata={"low": 0, "high": 1})
    """Of the input of LoRA, while training; below 1."""
    train_lambda: bool | None = None
    """Train lambda whole, at `optim.lambda_lr`. null: if the model has one."""
    train_norms: bool = False
    """Train the gains of all norms."""
    train_embeddings: bool = False
    """Train the embedding and the head, which is much: vocabulary times width."""
