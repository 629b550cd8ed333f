"""Recall from near or far: a learned span against fixed windows of equal cost.

Rows hide 8 facts (a key, its value) in noise: three rows of four a few tokens before the questions,
the others about a hundred. The noise tells which.

    python examples/adaptive_span_task.py OUTPUT_FOLDER
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from adms.attention.adaptive_span import AdaptiveSpan, Predictor
from adms.evaluation.plots.style import figure
from adms.evaluation.run_folder import Row, markdown_table, write_run

KEYS, VALUES, NOISE, DIMS, TOKENS, ASKED, RAMP, STEPS = 24, 8, 16, 32, 128, 4, 8, 500


def make_batch(rows: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids ``[rows, TOKENS, 3]`` (key, value, noise; 0 = none), and answers."""
    far = torch.rand(rows, generator=rng) < 0.25
    ids = torch.zeros(rows, TOKENS, 3, dtype=torch.long)
    ids[..., 2] = 1 + far[:, None] + 2 * torch.randint(NOISE // 2, (rows, TOKENS), generator=rng)
    keys = torch.rand(rows, KEYS, generator=rng).argsort(1)[:, :8]
    values = torch.randint(VALUES, (rows, 8), generator=rng)
    at = torch.where(far, 12, TOKENS - ASKED - 10)[:, None] + torch.arange(8)
    facts = torch.stack([keys + 1, values + 1, torch.zeros_like(keys)], dim=-1)
    ids.scatter_(1, at[..., None].expand(-1, -1, 3), facts)
    ids[:, -ASKED:, 0], ids[:, -ASKED:, 2] = keys[:, :ASKED] + 1, NOISE + 1
    return ids, values[:, :ASKED]


class Recall(nn.Module):
    """One attention layer, whose span is fixed or predicted from the row's mean."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Embedding(n + 2, DIMS) for n in (KEYS, VALUES, NOISE))
        self.attention = AdaptiveSpan(DIMS, 2, max_dist=TOKENS, ramp=RAMP)
        self.predictor, self.head, self.window = Predictor(DIMS), nn.Linear(DIMS, VALUES), window
        nn.init.constant_(self.predictor.linear.bias, 3.0)  # Starts wide: gradients see far facts.

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = sum(embed(ids[..., i]) for i, embed in enumerate(self.embed))
        fixed = torch.tensor((self.window or 0) - RAMP) / TOKENS
        scale = self.predictor(x) if self.window is None else fixed
        out, _ = self.attention(x[:, -ASKED:], x, x, span_scale=scale, is_causal=True)
        return self.head(out), scale


def train(window: int | None, penalty: float = 0.0, seed: int = 0) -> Row:
    """Train and test one model: its accuracy, and the keys a question reads (mean of the rows)."""
    torch.manual_seed(seed)
    rng, model = torch.Generator().manual_seed(seed + 1), Recall(window)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(STEPS):
        ids, answers = make_batch(64, rng)
        logits, scale = model(ids)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        (loss + (penalty * scale.mean() if step > STEPS // 2 else 0.0)).backward()
        optimizer.step()
    ids, answers = make_batch(2000, torch.Generator().manual_seed(99))
    logits, scale = model(ids)
    keys = (scale * TOKENS + RAMP).ceil().clamp(max=TOKENS).mean().item()  # The ramp is read too.
    right = (logits.argmax(-1) == answers).float().mean().item()
    return {"window": window, "penalty": penalty, "seed": seed, "accuracy": right, "keys": keys}


def display(row: Row) -> Row:
    """A model's row in the columns that people read."""
    name = f"fixed window of {row['window']}"
    if row["window"] is None:
        name = f"learned span, penalty {row['penalty']}, seed {row['seed']}"
    keys = f"{row['keys']:.0f}"
    return {"attention": name, "keys read per question": keys, "accuracy": f"{row['accuracy']:.0%}"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder of the run")
    output = parser.parse_args().output
    fixed = [train(window) for window in (16, 48, 112, 128)]
    learned = [train(None, penalty, seed) for penalty in (0.02, 0.05) for seed in range(3)]
    with figure(output / "plots" / "span.png", figsize=(7, 4)) as axes:
        for rows, look, label in (
            (fixed, "o-", "fixed window"),
            (learned, "k*", "learned span (2 penalties, 3 seeds)"),
        ):
            keys = [row["keys"] for row in rows]
            axes.plot(keys, [row["accuracy"] for row in rows], look, label=label)
        axes.set(xlabel="keys read per question (mean)", ylabel="accuracy", ylim=(0, 1.05))
        axes.legend(loc="lower right")
    table = markdown_table([display(row) for row in fixed + learned])
    config = {"tokens": TOKENS, "keys": KEYS, "steps": STEPS, "ramp": RAMP}
    body = f"{table}\n![accuracy](plots/span.png)"
    print(write_run(output, "A span that follows the content", config, fixed + learned, body))
