"""How many tokens a layer keeps (sections 1.2, 1.3, 4.3), and which (ties go to the earlier position)."""

import numpy as np


def count_of(length: int, amount: float) -> int:
    """A float is a share of the prompt, int(length * share) in double precision (section 1.2); an int is a number of
    tokens.
    """
    if isinstance(amount, bool) or amount < 0:
        raise ValueError(f"an amount of tokens must be a count or a share >= 0, got {amount!r}")
    return int(amount) if isinstance(amount, int | np.integer) else int(length * amount)


def pyramid_ratios(ratio: float, layers: int, depth: float = 7) -> list[float]:
    """MiniKV-Pyramid's heavy share of every layer; the mean over the layers is `ratio` (section 1.3). One layer gets
    `ratio`.
    """
    last = ratio / depth
    first = 2 * ratio - last
    if layers == 1:
        return [ratio]
    return [first + (last - first) * layer / (layers - 1) for layer in range(layers)]


def pyramidkv_budgets(capacity: int, window: int, layers: int, length: int, beta: int = 20) -> list[int]:
    """PyramidKV's number of selected tokens in every layer, the window not counted (section 4.3). One layer gets the
    mean budget.
    """
    if capacity < window:
        raise ValueError(f"the capacity, {capacity}, must not be below the window, {window}")
    mean = capacity - window
    if length < capacity:
        return [max(length - window, 0)] * layers
    if length < 2 * mean or layers == 1:
        return [mean] * layers
    low = mean // beta
    high = 2 * mean - low
    if high >= length - window:
        high = length - window
        low = 2 * mean - high
    step = (high - low) // (layers - 1)
    return [high - layer * step for layer in range(layers)]


def top_positions(scores: np.ndarray, count: int) -> list[int]:
    """Indices of the `count` highest scores, ascending. Of equal scores the earlier index wins."""
    best_first = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return sorted(best_first[:count])


def margin(scores: np.ndarray, count: int) -> float:
    """How close the choice of the `count` highest scores was: the relative gap to the nearest different score across
    the cut.

    Exactly equal scores at the cut are settled by position, so there the gap is the one from them to their nearest
    neighbours. Infinite when there was nothing to choose.
    """
    if not 0 < count < len(scores):
        return np.inf
    ordered = np.sort(np.asarray(scores, np.float64))[::-1]
    kept, dropped = ordered[count - 1], ordered[count]
    if kept != dropped:
        gap = kept - dropped
    else:
        above, below = ordered[ordered > kept], ordered[ordered < kept]
        gap = min(above.min() - kept if above.size else np.inf, kept - below.max() if below.size else np.inf)
    return float(gap / max(abs(kept), np.finfo(np.float64).tiny))
