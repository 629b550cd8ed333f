"""A video-like stream whose frames mostly reuse the keys and values of the frame before.

Scenes flicker around a still picture and change at random cuts. The gates of a layer learn when to
refresh; always refreshing is the reference. Usage: python examples/video_stream.py OUTPUT_FOLDER
"""

import json
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib import pyplot as plt

from adms.attention.adaptive_update import AdaptiveUpdateAttention
from adms.attention.streaming_transformer import process_video_sequence

DIMS, PATCHES, FLICKER, CUT_CHANCE, PENALTY, FRAMES = 64, 256, 0.2, 0.05, 0.02, 400


def make_video(frames: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return frames ``[T, 1, PATCHES, DIMS]`` and where cuts are ``[T]``."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.rand(frames, generator=generator) < CUT_CHANCE
    cuts[0] = True
    scenes = torch.randn(int(cuts.sum()), 1, PATCHES, DIMS, generator=generator)
    scenes = scenes + torch.randn(len(scenes), 1, 1, DIMS, generator=generator)  # Light, color.
    flicker = torch.randn(frames, 1, PATCHES, DIMS, generator=generator)
    return scenes[cuts.cumsum(0) - 1] + FLICKER * flicker, cuts


def train(layer: AdaptiveUpdateAttention, steps: int = 90) -> None:
    """Teach the gates, and only them: a small error with few refreshes."""
    gates = [p for name, p in layer.named_parameters() if "update" in name or "drift" in name]
    optimizer = torch.optim.Adam(gates, lr=0.05)
    for step in range(steps):
        kept, loss = {}, torch.zeros(())
        for frame in make_video(24, seed=1000 + step)[0]:
            output, caches = layer(frame, **kept)
            loss = loss + (PENALTY * layer.update_cost if kept else 0.0)
            kept = {name: caches[name].detach() for name in ("key_cache", "value_cache")}
            exact = layer(frame)[0].detach()
            loss = loss + (output - exact).square().mean() / exact.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


(folder := Path(sys.argv[1])).mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
layer = AdaptiveUpdateAttention(DIMS, heads=4)
for module in (layer.query_module, layer.key_module, layer.value_module):
    torch.nn.init.normal_(module.proj.weight, std=DIMS**-0.5)
train(layer)
video, cuts = make_video(FRAMES, seed=5)  # Not among those trained on.
with torch.no_grad():
    clock = [time.perf_counter()]
    outputs, updated = process_video_sequence(video, layer.eval())
    clock.append(time.perf_counter())
    exact = torch.stack([layer(frame)[0] for frame in video])
    clock.append(time.perf_counter())
    # As many refreshes, evenly spread: frame t attends to frame source[t] instead of itself.
    count, at = int(updated.sum()), torch.arange(FRAMES)
    source = -(-(at * count // FRAMES) * FRAMES // count)
    even = [layer(*pair)[0] for pair in zip(video, video[source], strict=True)]
lines = {f"evenly spread refreshes ({count})": even, f"learned refreshes ({count})": outputs}
results: dict = {"cuts": int(cuts.sum()), "cuts refreshed": int((updated[:, 0] & cuts).sum())}
results["ms (learned, always)"] = [(b - a) / FRAMES * 1e3 for a, b in pairwise(clock)]
axes = plt.subplots(figsize=(9, 4), layout="constrained")[1]
axes.vlines(at[cuts], 1e-4, 20, color="0.85", label=f"cuts ({results['cuts']})")
for name, line in lines.items():
    error = (torch.stack(line) - exact).square().mean((1, 2, 3)) / exact.square().mean()
    results[f"error, {name}"] = error.mean().item()
    axes.semilogy(error.clamp(min=1e-4), linewidth=1, label=name)
axes.plot(at[updated[:, 0]], torch.full((count,), 1.5e-4), "^", markersize=4, color="C1")
axes.set(xlabel="frame (triangles: refreshed)", ylabel="relative error²", ylim=(8e-5, 200))
axes.legend(loc="upper right", ncols=3)
plt.savefig(folder / "plot.png", dpi=120)
(folder / "results.json").write_text(json.dumps(results, indent=1))
