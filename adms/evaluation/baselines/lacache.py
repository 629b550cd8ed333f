"""LaCache: different layers keep different tokens, and what is old is thinned again and again."""

import torch

from adms.evaluation.baselines.policy import Eviction, Held, Setting


class LaCache(Eviction):
    """A ladder over the layers with iterative compaction.

    Of every two neighbouring tokens behind a cursor a layer keeps one, even layers the first and
    odd layers the second: the published default (span of half the layers, overlap 0). The cursor
    walks towards the newest tokens and starts again after the sinks.

    Source: Shi et al. (2025), arXiv 2507.14204, iterative compaction; differs in that the newest
    ``recent`` tokens are never thinned where the published code keeps one token per layer.
    """

    label = "LaCache"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.cursor = setting.sizes.sink

    def reduce(self, held: Held, weights: torch.Tensor | None, new: int) -> Held:
        """Thins from the cursor on until everything fits."""
        sizes = self.setting.sizes
        while held.num_entries > self.slots:
            end = held.num_entries - sizes.recent
            if end - self.cursor < 2:
                self.cursor = sizes.sink
            pairs = min(held.num_entries - self.slots, (end - self.cursor) // 2)
            index = torch.arange(held.num_entries, device=held.keys.device)
            dropped = self.cursor + 2 * torch.arange(pairs, device=index.device)
            # The ladder: what one layer drops, its neighbours keep.
            dropped = dropped + (self.setting.layer_idx + 1) % 2
            keep = torch.ones(held.num_entries, dtype=torch.bool, device=index.device)
            keep[dropped] = False
            held = held.take(index[keep])
            self.cursor += pairs
        return held
