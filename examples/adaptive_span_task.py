"""Recall from near or far: a learned span against fixed windows of equal cost.

Rows hide 8 facts (a key, its value) in noise: three rows of four a few tokens before the questions,
the others about a hundred. The noise tells which. Usage: python adaptive_span_task.py OUTPUT_FOLDER
"""

import sys
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from torch import nn

from adms.attention.adaptive_span import AdaptiveSpan, Predictor

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


def train(window: int | None, penalty: float = 0.0, seed: int = 0) -> dict:
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


(folder := Path(sys.argv[1])).mkdir(parents=True, exist_ok=True)
fixed = [train(window) for window in (8, 16, 32, 48, 64, 96, 112, 128)]
learned = [train(None, penalty, seed) for penalty in (0.02, 0.05) for seed in range(3)]
(folder / "results.txt").write_text("\n".join(map(str, fixed + learned)))
axes = plt.subplots(figsize=(7, 4), layout="constrained")[1]
axes.plot([r["keys"] for r in fixed], [r["accuracy"] for r in fixed], "o-", label="fixed window")
accuracy = [r["accuracy"] for r in learned]
axes.plot([r["keys"] for r in learned], accuracy, "*", label="learned span (2 penalties, 3 seeds)")
axes.set(xlabel="keys read per question (mean)", ylabel="accuracy", ylim=(0, 1.05))
axes.legend(loc="lower right")
plt.savefig(folder / "plot.png", dpi=120)
