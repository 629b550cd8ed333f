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

from adms.attention.dynamic import DynamicAttention
from adms.evaluation.plots.style import figure
from adms.evaluation.run_folder import Row, markdown_table, write_run

USERS, ITEMS, SIZE, ROUNDS, CLICKS = 512, 2048, 32, 24, 16
MARK = {"exact": "o-", "stale": "^--"}


def truth(attention: DynamicAttention, users: torch.Tensor) -> torch.Tensor:
    scores = users.double() @ attention.keys.double().T / SIZE**0.5
    return torch.softmax(scores, -1) @ attention.values.double()


def simulate(lazy_threshold: int, exact: bool) -> Row:
    """CPU milliseconds a round, and the largest error and bound, relative to the outputs' norm."""
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
        start = time.process_time()
        attention.update_key(clicked, keys[clicked])
        attention.update_value(clicked, values[clicked])
        promised = 0.0 if exact else float(attention.error_bound().max())
        read = attention.output()
        seconds += time.process_time() - start
        expected = truth(attention, users)
        norm = float(expected.norm(dim=-1).mean())
        error = max(error, float((read - expected).norm(dim=-1).max()) / norm)
        bound = max(bound, promised / norm)
    return {"ms_a_round": 1e3 * seconds / ROUNDS, "largest_error": error, "bound": bound}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder of the run")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    thresholds = [0, 16, 64, 256]
    rows: list[Row] = []
    with figure(output / "plots" / "recommender.png", 1, 2, figsize=(9, 3.6)) as (cost, accuracy):
        for exact, name in ((True, "exact"), (False, "stale")):
            own = [simulate(threshold, exact) for threshold in thresholds]
            rows += [
                {"lazy_threshold": t, "reads": name, **row}
                for t, row in zip(thresholds, own, strict=True)
            ]
            cost.plot(thresholds, [row["ms_a_round"] for row in own], MARK[name], label=name)
            errors = [row["largest_error"] for row in own]
            accuracy.plot(thresholds, errors, MARK[name], label=f"{name}: error")
        accuracy.plot(thresholds, [row["bound"] for row in own], "k:", label="stale: bound")
        cost.set(xlabel="lazy_threshold", ylabel="CPU ms a round", ylim=(0, None))
        accuracy.set(xlabel="lazy_threshold", ylabel="largest relative error", yscale="log")
        cost.legend()
        accuracy.legend()
    table = [
        {
            "lazy_threshold": row["lazy_threshold"],
            "reads": row["reads"],
            "CPU ms a round": f"{row['ms_a_round']:.1f}",
            "largest relative error": f"{row['largest_error']:.0e}",
            "bound": f"{row['bound']:.2g}" if row["reads"] == "stale" else "",
        }
        for row in rows
    ]
    body = (
        f"{USERS} users, {ITEMS} items, {CLICKS} clicks a round, {ROUNDS} rounds, one thread.\n\n"
        f"{markdown_table(table)}\n![cost and error](plots/recommender.png)"
    )
    config = {"users": USERS, "items": ITEMS, "size": SIZE, "clicks": CLICKS, "rounds": ROUNDS}
    print(write_run(output, "A recommender that stays current", config, rows, body))
