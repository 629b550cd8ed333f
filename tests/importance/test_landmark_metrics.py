"""Every metric inside a cache: it chooses landmarks and the bound holds."""

import pytest
import torch

from adms import enable_adms_llm
from adms.importance import METRICS
from tests.compressors.tiny import feed, random_ids, tiny_llama


@pytest.mark.parametrize("name", sorted(METRICS))
@pytest.mark.parametrize("compressor", ["low_rank", "vq"])
def test_landmarks_by_every_metric(name: str, compressor: str) -> None:
    model = tiny_llama()
    cache = enable_adms_llm(
        model,
        start_size=4,
        recent_size=64,
        compressed_budget=160,
        compressor_type=compressor,
        importance_metric=name,
        importance_ratio=0.2,
    )
    ids = random_ids(2, 700)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    assert feed(model, ids, cache, mask)[:, 30:].isfinite().all()
    _, tokens = cache.layers[1].middle.landmarks([632 - 4, 602 - 4])
    for row in tokens.tolist():
        # Distinct tokens of the text that have left the window.
        assert len(set(row)) == len(row)
        assert min(row) >= 4 and max(row) < 700 - 64
    assert cache.nbytes <= cache.max_nbytes
