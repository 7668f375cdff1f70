"""Narrower versions of published networks."""


def scaled_width(channels: int, width: float) -> int:
    """`channels` times `width`, rounded, at least 1.

    Raises:
        ValueError: `width` is not positive.
    """
    if not width > 0:
        raise ValueError(f"width is {width!r}: give a positive factor on the channels, 1.0 for the published network")
    return max(1, round(channels * width))
