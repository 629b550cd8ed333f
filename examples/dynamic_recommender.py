"""An online recommender: items' vectors change with every click, users' attention stays current.

Each of 512 users attends to 2048 items. Every round 16 clicks each move an item's key and value a
little towards the user who clicked, and then all users' attention is read. The plot shows what a
round costs and how far its reads are from the truth, against `lazy_threshold`, for exact reads
and for stale ones with their bound.

    python examples/dynamic_recommender.py OUTPUT_FOLDER
"""

import argparse
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

from adms.attention.dynamic import DynamicAttention

USERS, ITEMS, SIZE, ROUNDS, CLICKS = 512, 2048, 32, 24, 16


def truth(attention: DynamicAttention, users: torch.Tensor) -> torch.Tensor:
    scores = users.double() @ attention.keys.double().T / SIZE**0.5
    return torch.softmax(scores, -1) @ attention.values.double()


def simulate(lazy_threshold: int, exact: bool) -> tuple[float, float, float]:
    """Milliseconds a round, and the largest error and bound, relative to the outputs' norm."""
    generator = torch.Generator().manual_seed(0)
    users, keys, values = (torch.randn(n, SIZE, generator=generator) for n in (USERS, ITEMS, ITEMS))
    attention = DynamicAttention(users, keys, values, lazy_threshold, exact=exact)
    # Popular items are clicked most: a fresh read is due only when many have changed.
    popularity = 1.0 / torch.arange(1, ITEMS + 1)
    seconds, error, bound = 0.0, 0.0, 0.0
    for _ in range(ROUNDS):
        clicked = popularity.multinomial(CLICKS, replacement=False, generator=generator).tolist()
        by = torch.randint(USERS, (CLICKS,), generator=generator)
        keys[clicked] += 0.02 * (users[by] - keys[clicked])
        values[clicked] += 0.02 * (users[by] - values[clicked])
        start = time.perf_counter()
        attention.update_key(clicked, keys[clicked])
        attention.update_value(clicked, values[clicked])
        promised = 0.0 if exact else float(attention.error_bound().max())
        read = attention.output()
        seconds += time.perf_counter() - start
        expected = truth(attention, users)
        norm = float(expected.norm(dim=-1).mean())
        error = max(error, float((read - expected).norm(dim=-1).max()) / norm)
        bound = max(bound, promised / norm)
    return 1e3 * seconds / ROUNDS, error, bound


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    thresholds = [0, 8, 16, 32, 64, 128, 256]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    cost, accuracy = figure.subplots(1, 2)
    print("| lazy_threshold | reads | ms a round | largest error | bound |\n|---|---|---|---|---|")
    for exact, name in ((True, "exact"), (False, "stale")):
        rows = [simulate(threshold, exact) for threshold in thresholds]
        for threshold, (ms, error, bound) in zip(thresholds, rows, strict=True):
            print(f"| {threshold} | {name} | {ms:.2f} | {error:.1e} | {bound:.2f} |")
        cost.plot(thresholds, [row[0] for row in rows], "o-", label=name)
        accuracy.plot(thresholds, [row[1] for row in rows], "o-", label=f"{name}: error")
    accuracy.plot(thresholds, [row[2] for row in rows], "--", label="stale: bound")
    cost.set(xlabel="lazy_threshold", ylabel="ms a round", ylim=(0, None))
    accuracy.set(xlabel="lazy_threshold", ylabel="largest relative error", yscale="log")
    cost.legend()
    accuracy.legend()
    figure.savefig(output / "recommender.png", dpi=150)
