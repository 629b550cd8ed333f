"""The benchmark of milliseconds per token, on a tiny model."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from adms import ADMSConfig, ADMSValueError, enable_adms_llm
from adms.evaluation.latency import (
    FULL,
    QUANTIZED,
    STATIC,
    advance_counts,
    fill_bounded,
    measure_all,
    obstacle,
)
from adms.evaluation.methods import ADMS, STREAMING
from adms.evaluation.plots.latency import plot_latency
from adms.evaluation.random_models import random_llama
from tests.streams import feed, random_ids

CONFIG = ADMSConfig(start_size=4, recent_size=64, compressed_budget=160)


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    return random_llama("tiny", torch.device("cpu"), torch.float32)


def test_every_method_side_by_side(tmp_path: Path) -> None:
    methods = [FULL, STATIC, QUANTIZED, STREAMING, ADMS]
    rows = list(
        measure_all(tiny(), methods, CONFIG, batches=[1, 2], positions=[300, 400], tokens=9)
    )
    assert [(row["method"], row["batch"], row["position"]) for row in rows] == [
        (method, batch, position)
        for method in methods
        for batch, position in ((1, 300), (1, 400), (2, 300))
    ]
    for row in rows:
        if row["method"] == QUANTIZED and obstacle(QUANTIZED):
            assert row["note"] == "optimum-quanto is not installed"
            continue
        assert 0 < row["token_ms_median"] <= row["token_ms_p99"]
        assert row["cache_bytes"] > 0
    held = {(row["method"], row["batch"], row["position"]): row.get("cache_bytes") for row in rows}
    assert held[ADMS, 1, 400] <= 1.01 * held[ADMS, 1, 300]
    assert held[FULL, 1, 300] < held[FULL, 1, 400] and held[ADMS, 2, 300] > 1.9 * held[ADMS, 1, 300]
    drawn = plot_latency(rows, tmp_path)
    assert [path.name for path in drawn] == ["position.png", "memory.png", "batch.png"]
    assert all(path.stat().st_size > 0 for path in drawn)


def test_the_fit_to_the_model_is_a_column_of_its_own(slow_fit: list[float]) -> None:
    (row,) = measure_all(tiny(), [ADMS], CONFIG, batches=[1], positions=[400], tokens=9)
    assert row["fit_s"] > 1000 and row["read_tokens_per_s"] > 1


def test_an_unknown_cache_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ADMSValueError, match="unknown cache 'nope'; the caches are full, static"):
        list(measure_all(tiny(), ["nope"], CONFIG, batches=[1], positions=[300], tokens=9))
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--only", "sweep", "--methods", "full,nope"])
    script = Path(__file__).parents[2] / "scripts" / "benchmark.py"
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert stopped.value.code == 2 and "unknown cache 'nope'" in capsys.readouterr().err


@pytest.mark.parametrize("position", [600, 100_000])
def test_an_advanced_cache_goes_on(position: int) -> None:
    model = tiny()
    cache = enable_adms_llm(model, CONFIG)
    fill_bounded(model, cache, 1, position)
    assert position - CONFIG.recent_size - CONFIG.compression_interval < cache.tokens_seen
    assert cache.tokens_seen <= position
    before = cache.tokens_seen
    logits = feed(model, random_ids(1, 30), cache, step=1)
    assert cache.tokens_seen == before + 30
    assert torch.isfinite(logits).all()
    advance_counts(cache, before)
    assert cache.tokens_seen == before + 30
