"""How sure a measured share is."""

# Two-sided 95% of a normal distribution.
_Z95 = 1.959963984540054


def wilson_interval(share: float, n: int, z: float = _Z95) -> tuple[float, float]:
    """Wilson's score interval of a share.

    It is::

        (share + z^2 / 2n -+ z sqrt(share (1 - share) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Unlike the textbook interval it stays within 0..1 and has a width at 0 and 1.

    Args:
        share: The share that was observed, in 0..1.
        n: Number of independent observations; of none, nothing is known: (0, 1).
        z: Quantile of the normal distribution; the default is for 95%.

    Source:
        Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).

    Example:
        >>> [round(bound, 4) for bound in wilson_interval(0.9, 200)]
        [0.8506, 0.9343]
    """
    if n == 0:
        return 0.0, 1.0
    centre = share + z * z / (2 * n)
    half = z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    scale = 1 + z * z / n
    # The rounding of the root must not leave 1e-18 where the bound is 0.
    low = 0.0 if share == 0 else (centre - half) / scale
    high = 1.0 if share == 1 else (centre + half) / scale
    return low, high
