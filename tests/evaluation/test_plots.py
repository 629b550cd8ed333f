"""Pictures: whole files, distinct looks, and what they must not hide."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from PIL import Image

from adms import ADMSConfig, ADMSValueError, enable_adms_llm
from adms.evaluation.methods import method_names
from adms.evaluation.models import load_model
from adms.evaluation.plots import Line, plot_quality, plot_recall, plot_streams, plot_tiers
from adms.evaluation.plots.style import figure, look
from adms.evaluation.report import display, draw
from adms.evaluation.run_folder import RunFolder
from adms.evaluation.settings import Evaluation
from adms.evaluation.tiers import spans
from adms.evaluation.units import Unit


def test_no_two_methods_look_alike_without_colour() -> None:
    styles = [look(name) for name in method_names()]
    assert len({style["marker"] for style in styles}) == len(styles)
    # Lines of the same colour differ in style, so lines without markers are told apart too.
    assert len({(style["color"], str(style["linestyle"])) for style in styles}) == len(styles)


def test_the_two_that_matter_differ_in_lightness() -> None:
    def lightness(name: str) -> float:
        return float(np.dot(to_rgb(look(name)["color"]), (0.2126, 0.7152, 0.0722)))

    assert abs(lightness("adms") - lightness("streaming")) > 0.05
    assert look("adms")["linestyle"] != look("streaming")["linestyle"]


def line(method: str, tokens: int, level: float) -> Line:
    losses = np.full(tokens - 1, level)
    return Line(method, method, losses, [tokens // 2, tokens], [2**20, 2**21])


@pytest.mark.parametrize("methods", [("full", "adms"), ("adms", "streaming"), ("full",)])
def test_streams_of_any_methods_and_lengths(tmp_path: Path, methods: tuple[str, ...]) -> None:
    for tokens in (3, 40, 600):
        file = tmp_path / f"{tokens}.png"
        plot_streams(file, [line(name, tokens, 2.0) for name in methods], title="t")
        with Image.open(file) as picture:
            assert picture.width > 900
            assert picture.convert("L").getextrema()[0] < 100


def test_quality_and_recall(tmp_path: Path) -> None:
    rows = [
        {"method": name, "label": name, "max_bytes": size, "cache_bytes": size, "perplexity": 9.0}
        for name in ("full", "adms", "streaming")
        for size in (2**20, 2**22)
    ]
    plot_quality(tmp_path / "quality.png", rows, title="t")
    cells = [
        {"label": name, "context": length, "depth": depth, "recall": 0.5}
        for name in method_names()
        for length in (512, 1024)
        for depth in (0.1, 0.5)
    ]
    plot_recall(tmp_path / "recall.png", cells[:-1], title="t")
    for name in ("quality.png", "recall.png"):
        with Image.open(tmp_path / name) as picture:
            # A page is about 1.4 times as high as it is wide; far wider would be unreadable.
            assert 0.3 < picture.height / picture.width < 2


def test_latency_has_a_line_for_every_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, float] = {}
    real = Axes.step

    def step(self: Axes, *values: Any, **style: Any) -> Any:
        drawn[style["label"]] = style["linewidth"]
        return real(self, *values, **style)

    monkeypatch.setattr(Axes, "step", step)
    units = [
        Unit(f"speed/adms/b{budget}", "speed", "adms", ADMSConfig(compressed_budget=budget))
        for budget in (24, 40)
    ]
    folder = RunFolder(tmp_path, {})
    rows = []
    for unit in units:
        budget = unit.config.compressed_budget
        row = {"task": "speed", "method": "adms", "label": f"ADMS {budget}"}
        rows.append({**row, "compressed_budget": budget})
        folder.finish(unit.key, rows[-1:], {"token_ms": np.asarray([1.0, 2.0])})
    assert draw(Evaluation(tasks=("speed",)), folder, units, rows) == {"speed": ["latency.png"]}
    assert drawn["ADMS 24"] > drawn["ADMS 40"] > 0


def test_a_failure_while_drawing_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), figure(tmp_path / "x.png"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_speeds_have_three_digits() -> None:
    measured = {"token_ms_median": 108.952, "write_tokens_per_s": 1430.82, "fit_s": 0.012345}
    (row,) = display([{"label": "ADMS", **measured}], "speed")
    assert (row["token ms median"], row["write tokens/s"]) == ("109", "1,430")
    assert row["fit s"] == "0.0123" and row["read tokens/s"] is None


def test_tiers_cover_the_text_once_and_their_bytes_are_the_caches(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    model, _ = load_model(tiny_model_folder)
    config = ADMSConfig(start_size=2, compressed_budget=40, recent_size=16, prefill_chunk_size=16)
    cache = enable_adms_llm(model, config)
    with pytest.raises(ADMSValueError, match="empty"):
        spans(cache)
    for tokens in (10, 60, 400):
        with torch.no_grad():
            model(torch.randint(0, 256, (1, tokens)), past_key_values=cache)
        found = spans(cache)
        assert found[0].start == 0 and found[-1].stop == cache.tokens_seen
        for left, right in zip(found[:-1], found[1:], strict=True):
            assert left.stop == right.start
    # The buffers are there from the first token on, so only now is every tier's part in use.
    total = sum(span.nbytes for span in found)
    assert 0.95 * cache.nbytes <= total <= cache.nbytes
    assert [span.tier for span in found] == ["sink", "forgotten", "middle", "recent"]
    plot_tiers(tmp_path / "tiers.png", found, title="t")
    assert (tmp_path / "tiers.png").stat().st_size > 1000
