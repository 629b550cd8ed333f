"""A video-like stream whose frames mostly reuse the keys and values of the frame before.

Scenes flicker around a still picture and change at random cuts. The gates of a layer learn when to
refresh; always refreshing is the reference. The plot is of the first seed.

    python examples/video_stream.py OUTPUT_FOLDER [--seeds 0 1 2] [--dims 64]
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from adms.attention.adaptive_update import AdaptiveUpdateAttention
from adms.attention.streaming_transformer import process_video_sequence
from adms.evaluation.plots.style import figure
from adms.evaluation.run_folder import Row, markdown_table, write_run

PATCHES, FLICKER, CUT_CHANCE, PENALTY, FRAMES = 256, 0.2, 0.05, 0.02, 400


def make_video(frames: int, dims: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return frames ``[T, 1, PATCHES, dims]`` and where cuts are ``[T]``."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.rand(frames, generator=generator) < CUT_CHANCE
    cuts[0] = True
    scenes = torch.randn(int(cuts.sum()), 1, PATCHES, dims, generator=generator)
    scenes = scenes + torch.randn(len(scenes), 1, 1, dims, generator=generator)  # Light, color.
    flicker = torch.randn(frames, 1, PATCHES, dims, generator=generator)
    return scenes[cuts.cumsum(0) - 1] + FLICKER * flicker, cuts


def train(layer: AdaptiveUpdateAttention, dims: int, steps: int = 90) -> None:
    """Teach the gates, and only them: a small error with few refreshes."""
    gates = [p for name, p in layer.named_parameters() if "update" in name or "drift" in name]
    optimizer = torch.optim.Adam(gates, lr=0.05)
    for step in range(steps):
        kept, loss = {}, torch.zeros(())
        for frame in make_video(24, dims, seed=1000 + step)[0]:
            output, caches = layer(frame, **kept)
            loss = loss + (PENALTY * layer.update_cost if kept else 0.0)
            kept = {name: caches[name].detach() for name in ("key_cache", "value_cache")}
            exact = layer(frame)[0].detach()
            loss = loss + (output - exact).square().mean() / exact.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def errors(outputs: Sequence[torch.Tensor], exact: torch.Tensor) -> torch.Tensor:
    """Squared error of each frame, relative to the reference ``[T, 1, PATCHES, dims]``."""
    return (torch.stack(list(outputs)) - exact).square().mean((1, 2, 3)) / exact.square().mean()


def run(seed: int, dims: int) -> tuple[Row, dict[str, torch.Tensor]]:
    """One layer from these initial weights: figures, and what a plot needs."""
    torch.manual_seed(seed)
    layer = AdaptiveUpdateAttention(dims, heads=4)
    for module in (layer.query_module, layer.key_module, layer.value_module):
        torch.nn.init.normal_(module.proj.weight, std=dims**-0.5)
    train(layer, dims)
    video, cuts = make_video(FRAMES, dims, seed=5)  # Not among those trained on.
    with torch.no_grad():
        clock = [time.process_time()]
        outputs, updated = process_video_sequence(video, layer.eval())
        clock.append(time.process_time())
        exact = torch.stack([layer(frame)[0] for frame in video])
        clock.append(time.process_time())
        # As many refreshes, evenly spread: frame t attends to frame source[t] instead of itself.
        count, at = int(updated.sum()), torch.arange(FRAMES)
        source = -(-(at * count // FRAMES) * FRAMES // count)
        even = [layer(*pair)[0] for pair in zip(video, video[source], strict=True)]
    refreshed = updated[:, 0]
    traces = {"learned": errors(outputs, exact), "evenly spread": errors(even, exact)}
    row = {
        "seed": seed,
        "dims": dims,
        "refreshed": count,
        "cuts": int(cuts.sum()),
        "cuts_refreshed": int((refreshed & cuts).sum()),
        "error_learned": traces["learned"].mean().item(),
        "error_even": traces["evenly spread"].mean().item(),
        "ms_learned": (clock[1] - clock[0]) / FRAMES * 1e3,
        "ms_always": (clock[2] - clock[1]) / FRAMES * 1e3,
    }
    return row, {**traces, "cuts": at[cuts], "refreshed": at[refreshed]}


def draw(path: Path, row: Row, found: dict[str, torch.Tensor]) -> None:
    """The error along the video, with cuts and refreshes."""
    with figure(path, figsize=(9, 4)) as axes:
        axes.vlines(found["cuts"], 1e-4, 20, color="0.85", label=f"cuts ({row['cuts']})")
        for name, line in (("evenly spread", "--"), ("learned", "-")):
            label = f"{name} refreshes ({row['refreshed']})"
            axes.semilogy(found[name].clamp(min=1e-4), line, linewidth=1, label=label)
        marks = torch.full((len(found["refreshed"]),), 1.5e-4)
        axes.plot(found["refreshed"], marks, "^", markersize=4, color="C1")
        axes.set(xlabel="frame (triangles: refreshed)", ylabel="relative error²")
        axes.set_ylim(8e-5, 200)
        axes.legend(loc="upper right", ncols=3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder of the run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the weights")
    parser.add_argument("--dims", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = [run(seed, given.dims) for seed in given.seeds]
    draw(given.output / "plots" / "video.png", *found[0])
    rows = [row for row, _ in found]
    table = [
        {
            "seed": row["seed"],
            "frames refreshed": f"{row['refreshed']} of {FRAMES}",
            "cuts refreshed": f"{row['cuts_refreshed']} of {row['cuts']}",
            "squared error": f"{row['error_learned']:.1%}",
            "as many, evenly spread": f"{row['error_even']:.0%}",
            "CPU ms a frame": f"{row['ms_learned']:.2f}",
            "always refreshing": f"{row['ms_always']:.2f}",
        }
        for row in rows
    ]
    body = (
        f"{FRAMES} frames of {PATCHES} patches, {given.dims} dims, one thread; errors against "
        f"always refreshing.\n\n{markdown_table(table)}\n![error along the video](plots/video.png)"
    )
    config = {"seeds": given.seeds, "dims": given.dims, "frames": FRAMES, "patches": PATCHES}
    print(write_run(given.output, "A video that reuses its keys", config, rows, body))
