"""ZSMerge: exact tail, exact tokens of high score, and merged slots that count for several."""

import torch

from adms.evaluation.baselines.policy import SCORE_BYTES, Eviction, Held

DECAY = 0.98


class ZSMerge(Eviction):
    """What is evicted is averaged into the most similar merged slot, with the log of its count.

    A quarter of the budget is merged slots, the rest exact tokens of high score.

    Source: Liu et al. (2025), arXiv 2503.10714; differs in that keys are averaged before positions,
    slots are chosen by cosine instead of dot product, and a chunk's evictions are merged together.
    """

    label = "ZSMerge"
    needs_weights = True
    # A score for every slot; merged slots also have a count and a position.
    numbers = 1

    def reduce(self, held: Held, weights: torch.Tensor | None, new: int) -> Held:
        """Updates scores and merges what no longer fits."""
        if weights is None:
            raise RuntimeError("ZSMerge was given no attention weights")
        fade = DECAY ** torch.arange(new - 1, -1, -1, device=weights.device)
        score = (weights * fade[None, :, None]).sum(1)
        if "score" in held.fields:
            score = score + held.fields["score"] * DECAY**new
        count = held.fields.get("count", torch.zeros_like(score))
        count = torch.where(count == 0, 1.0, count)
        held = held.with_fields(score=score, count=count)
        if held.num_entries <= self.slots:
            return held
        return self._merge(held)

    @property
    def merged_slots(self) -> int:
        """Slots for merged entries; their counts and positions are paid from their number."""
        budget = self.slots - self.setting.sizes.sink - self.setting.sizes.recent
        return max(1, budget // 4)

    @property
    def max_entries(self) -> int:
        """The slots less those that pay for the merged slots' counts and positions."""
        extra = 2 * SCORE_BYTES * self.setting.shape.num_heads * self.merged_slots
        return self.slots - -(-extra // self.setting.exact_bytes)

    def nbytes(self, held: Held) -> int:
        """Entries with a score each, and two more numbers for those that may be merged."""
        merged = min(held.num_entries, self.merged_slots)
        extra = 2 * SCORE_BYTES * self.setting.shape.num_heads * merged
        return super().nbytes(held) + extra

    def _merge(self, held: Held) -> Held:
        sizes, total = self.setting.sizes, held.num_entries
        exact = self.max_entries - self.merged_slots
        rank = held.fields["score"].clone()
        # Merged entries stay merged: only entries of one token compete for exact slots.
        rank[held.fields["count"] > 1] = -torch.inf
        rank[:, : sizes.sink] = torch.inf
        rank[:, total - sizes.recent :] = torch.inf
        order = rank.argsort(dim=1, descending=True, stable=True)
        kept = held.take(order[:, :exact])
        rest = held.take(order[:, exact:].sort(dim=1).values)
        merged = self._pool(rest)
        joined = Held(
            torch.cat([kept.keys, merged.keys], dim=1),
            torch.cat([kept.values, merged.values], dim=1),
            torch.cat([kept.tokens, merged.tokens], dim=1),
            {
                name: torch.cat([kept.fields[name], merged.fields[name]], dim=1)
                for name in kept.fields
            },
        )
        joined = joined.take(joined.tokens.argsort(dim=1, stable=True))
        return Held(
            joined.keys,
            joined.values,
            joined.tokens,
            joined.fields,
            joined.fields["count"].log(),
        )

    def _pool(self, rest: Held) -> Held:
        """The entries of ``rest`` in ``merged_slots`` averages."""
        slots = self.merged_slots
        if rest.num_entries <= slots:
            return rest
        # The entries that already stand for most tokens are the slots, else the oldest.
        seeds = rest.fields["count"].argsort(dim=1, descending=True, stable=True)[:, :slots]
        unit = torch.nn.functional.normalize(rest.keys.float(), dim=-1)
        chosen = unit.gather(1, seeds[..., None].expand(-1, -1, unit.shape[2]))
        slot = (unit @ chosen.transpose(1, 2)).argmax(-1)
        # A slot's own entry stays in it, so that none is left empty.
        slot.scatter_(1, seeds, torch.arange(slots, device=slot.device).expand_as(seeds))
        count = rest.fields["count"]
        total = torch.zeros_like(count[:, :slots]).scatter_add_(1, slot, count)

        def average(states: torch.Tensor) -> torch.Tensor:
            weighted = states.float() * count[..., None]
            index = slot[..., None].expand_as(weighted)
            sums = weighted.new_zeros(len(states), slots, states.shape[2])
            return (sums.scatter_add_(1, index, weighted) / total[..., None]).to(states.dtype)

        score = torch.zeros_like(total).scatter_reduce_(
            1, slot, rest.fields["score"], reduce="amax", include_self=False
        )
        tokens = average(rest.tokens[..., None])[..., 0]
        fields = {"score": score, "count": total}
        return Held(average(rest.keys), average(rest.values), tokens, fields)
