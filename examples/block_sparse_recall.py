"""Associative recall over 1024 tokens: a learned 90% sparse pattern against a fixed local one.

After 511 pairs of key and value comes one of the keys again; its value is asked for. Both models
attend to as many blocks; one chooses them by content, the other takes the nearest.

    python examples/block_sparse_recall.py OUTPUT_FOLDER [--steps 300]
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from adms.attention.block_sparse import AdaptiveConfig, AdaptiveSparsityTrainer, BlockSparseAdaptive
from adms.evaluation.plots.style import figure
from adms.evaluation.run_folder import Row, markdown_table, write_run

TOKENS, KEYS, VALUES, SIZE = 1024, 512, 32, 64


class Recall(nn.Module):
    """Attention with one projection for queries and keys; a token's key is the one before's."""

    def __init__(self, local_fraction: float) -> None:
        super().__init__()
        config = AdaptiveConfig(0.9, 0.0, block_size=16, local_fraction=local_fraction)
        self.embedding = nn.Embedding(KEYS + VALUES, SIZE)
        self.match, self.v = (nn.Linear(SIZE, SIZE, bias=False) for _ in range(2))
        nn.init.orthogonal_(self.match.weight)
        self.attention = BlockSparseAdaptive([TOKENS], [1], 1, SIZE, config)
        self.answer = nn.Linear(SIZE, VALUES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).unsqueeze(2)
        q, k = self.match(x[:, -1:]), self.match(x).roll(1, 1)
        return self.answer(self.attention(q, k, self.v(x), is_causal=True)[:, 0, 0])


def batch_of(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    keys = torch.rand(size, KEYS, generator=generator).argsort(-1)
    values = torch.randint(VALUES, (size, KEYS), generator=generator)
    asked = torch.randint(KEYS - 1, (size, 1), generator=generator)
    tokens = torch.stack([keys, values + KEYS], -1).flatten(1)
    tokens[:, -1:] = keys.gather(1, asked)
    return tokens, values.gather(1, asked)[:, 0]


def train(local_fraction: float, steps: int) -> tuple[list[float], Row]:
    """The training losses, and what was found."""
    torch.manual_seed(0)
    start = time.perf_counter()
    generator, model = torch.Generator().manual_seed(0), Recall(local_fraction)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    trainer = AdaptiveSparsityTrainer(model, 1.0, 0.1, annealing_steps=steps)
    losses = []
    for _ in range(steps):
        tokens, answers = batch_of(32, generator)
        losses.append(loss := nn.functional.cross_entropy(model(tokens), answers))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trainer.step()
    tokens, answers = batch_of(512, torch.Generator().manual_seed(1))
    with torch.no_grad():
        accuracy = (model.eval()(tokens).argmax(-1) == answers).float().mean().item()
    sparsity = trainer.analyze_patterns([tokens], 64)["sparsity_ratios"][0]
    seconds = time.perf_counter() - start
    found = {"sparsity": sparsity, "recall": accuracy, "seconds": seconds}
    return [loss.item() for loss in losses], found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder of the run")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    given = parser.parse_args()
    rows: list[Row] = []
    with figure(given.output / "plots" / "recall.png", figsize=(6, 4)) as panel:
        for name, fraction, line in (
            ("chosen by content", 0.0, "-"),
            ("nearest blocks", 1.0, "--"),
        ):
            losses, found = train(fraction, given.steps)
            rows.append({"pattern": name, **found})
            label = f"{name}: recall {found['recall']:.0%}"
            panel.plot(losses, line, label=label, linewidth=0.8)
        panel.set(xlabel="training step", ylabel="cross-entropy")
        panel.legend()
    table = [
        {**row, "sparsity": f"{row['sparsity']:.1%}", "recall": f"{row['recall']:.1%}"}
        for row in rows
    ]
    for row in table:
        del row["seconds"]
    body = (
        f"{KEYS - 1} pairs, {VALUES} values, {TOKENS} tokens, {given.steps} training steps, one "
        f"seed.\n\n{markdown_table(table)}\n![training](plots/recall.png)"
    )
    config = {"tokens": TOKENS, "keys": KEYS, "values": VALUES, "size": SIZE, "steps": given.steps}
    print(write_run(given.output, "Associative recall", config, rows, body))
