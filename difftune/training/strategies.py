"""How several devices train together."""

from lightning.pytorch.strategies import DDPStrategy, Strategy


def build_strategy(name: str) -> Strategy | str:
    """Turn a name into what ``Trainer(strategy=...)`` takes.

    Args:
        name: ``auto`` (one device: none; several: Lightning's choice, which is data parallel) or ``ddp`` (a
            copy of the model on every device; gradients live in the communication buckets, which saves a copy
            of them).

    Returns:
        A name or a strategy object.

    Raises:
        ValueError: For any other name.
    """
    if name == "auto":
        return "auto"
    if name == "ddp":
        return DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False)
    raise ValueError(f"strategy must be auto or ddp, got {name!r}")
