"""The keys of `adapter` in a recipe."""

from dataclasses import dataclass

from difftune.config.field import key as _key


@dataclass
class AdapterConfig:
    """A few parameters to train beside a frozen model: low-rank updates (LoRA) of projections, and lambda whole."""

    preset: str | None = _key(None, choices=("lambda_only", "negative_branch", "attention", "all_linear"))
    """LoRA on nothing (lambda alone); q2_proj and k2_proj; every query, key, value and output projection; those
    and the gated unit. null: `attention`, unless `targets` are given."""
    targets: list[str] = _key([])
    """Projections by name, such as [q2_proj, k2_proj, v_proj], instead of a preset."""
    rank: int = _key(16, low=1, most=65536)
    """Rank of every projection, unless `ranks` says otherwise."""
    alpha: float = _key(32.0, above=0)
    """The update is scaled by alpha / rank, unless `alphas` says otherwise."""
    ranks: dict[str, int] = _key({}, low=1, most=65536)
    """Rank by branch, such as {negative: 8}: `positive` (q1, k1), `negative` (q2, k2), `shared` (all others)."""
    alphas: dict[str, float] = _key({}, above=0)
    """Alpha by branch."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    use_dora: bool = False
    """Train the length of each row apart from its direction."""
    dropout: float = _key(0.0, low=0, high=1)
    """Of the input of LoRA, while training; below 1."""
    train_lambda: bool | None = None
    """Train lambda whole, at `optim.lambda_lr`. null: if the model has one."""
    train_norms: bool = False
    """Train the gains of all norms."""
    train_embeddings: bool = False
    """Train the embedding and the head, which is much: vocabulary times width."""
