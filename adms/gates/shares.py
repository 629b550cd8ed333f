"""Which layers admit how many tokens, so that a mean share costs the least.

Layers differ a lot: in SmolLM2 one of them is hurt by folding more than most others together
(docs/optional-layers.md). So what each layer loses alone is measured at a few shares, and tokens
are taken away where that costs least for each of them.

Shapes: ``L`` layers, ``S`` shares that were measured.
"""

from collections.abc import Sequence

from adms.errors import ADMSValueError

# Shares that a layer may admit, beside all.
SHARES = (0.5, 0.25, 0.125)


def water_fill(
    losses: Sequence[Sequence[float]], shares: Sequence[float], mean: float
) -> tuple[float, ...]:
    """A share for each layer, with a mean of at most ``mean`` and little loss in all.

    Losses of layers are taken to add up. One after the other, the layer is lowered, by one or
    several of its steps, that loses least per token that it no longer admits.

    Args:
        losses: ``[L][S]`` what the model loses when a layer alone admits each of the shares;
            nothing where it admits all.
        shares: falling, below 1.
        mean: of the result.

    Raises:
        ADMSValueError: the lowest shares have a larger mean.
    """
    if mean < shares[-1]:
        raise ADMSValueError(
            f"a mean admission of {mean:g} is below the least share of a layer, {shares[-1]:g}"
        )
    steps = [(1.0, *shares)] * len(losses)
    costs = [(0.0, *layer) for layer in losses]
    chosen = [0] * len(losses)
    while sum(steps[layer][at] for layer, at in enumerate(chosen)) > mean * len(losses) + 1e-9:
        _, layer, at = min(
            (
                (costs[layer][to] - costs[layer][at]) / (steps[layer][at] - steps[layer][to]),
                layer,
                to,
            )
            for layer, at in enumerate(chosen)
            for to in range(at + 1, len(steps[layer]))
        )
        chosen[layer] = at
    return tuple(steps[layer][at] for layer, at in enumerate(chosen))


def in_proportion(weights: Sequence[float], least: float) -> tuple[float, ...]:
    """Parts with a mean of 1, in proportion to positive weights as far as none is below ``least``.

    Args:
        weights: one per part.
        least: at most 1.
    """
    raised: set[int] = set()
    while True:
        left = len(weights) - least * len(raised)
        total = sum(weight for index, weight in enumerate(weights) if index not in raised)
        parts = tuple(
            least if index in raised else weight * left / total
            for index, weight in enumerate(weights)
        )
        # A hair, so that weights that are alike give parts that are.
        low = {index for index, part in enumerate(parts) if part < least - 1e-9}
        if not low:
            return parts
        raised |= low
