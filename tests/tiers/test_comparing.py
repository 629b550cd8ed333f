"""What metrics are shown that compare tokens with others, and what ``rarity`` makes of it."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

import adms.importance.rarity
from adms import enable_adms_llm
from adms.config import ADMSConfig
from adms.entries import Entries
from adms.errors import ForwardError
from adms.importance import METRICS, Evidence, Others
from adms.importance.rarity import APART, rarity
from adms.tiers.candidates import ALONE_WEIGHT, Candidates, settle
from adms.tiers.comparing import comparing_layers
from tests.streams import feed, random_ids, tiny_llama

LAYERS, ROWS = 4, 2
SETTINGS: dict[str, Any] = {
    "start_size": 4,
    "compressed_budget": 96,
    "recent_size": 90,
    "compression_interval": 6,
    "prefill_chunk_size": 16,
}


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Entries, Evidence, Others]]:
    """What ``noted``, which is ``rarity``, was shown."""
    calls: list[tuple[Entries, Evidence, Others]] = []

    def noted(entries: Entries, evidence: Evidence) -> torch.Tensor:
        if evidence.others is not None:
            others = evidence.others()
            calls.append((entries, evidence, Others(others.keys.clone(), others.tokens.clone())))
        return rarity(entries, evidence)

    noted.compares = True  # type: ignore[attr-defined]
    monkeypatch.setitem(METRICS._items, "noted", noted)
    return calls


def in_order(others: Others) -> torch.Tensor:
    """All tokens after the sinks, as a row's turn shows them."""
    return 4 + torch.arange(others.keys.shape[2])[None]


@pytest.mark.parametrize("compressor", ["low_rank", "quantized", "vq", "auto"])
@pytest.mark.parametrize(
    ("step", "recent", "interval"),
    # Passes that are longer than the ring write to some of its slots only.
    [(1, 90, 6), (16, 90, 6), (150, 90, 6), (200, 100, 60)],
)
def test_others_are_the_stream_before_and_after(
    shown: list[tuple[Entries, Evidence, Others]],
    compressor: str,
    step: int,
    recent: int,
    interval: int,
) -> None:
    """Exact keys of the window and codes of what is older, each under its own text position."""
    model = tiny_llama(layers=LAYERS, trained=2048)
    settings = {
        **SETTINGS,
        **{"recent_size": recent, "compression_interval": interval},
        # What waits for others is taken off it.
        "compressed_budget": 90 + 2 * interval,
        "prefill_chunk_size": max(16, step),
    }
    cache = enable_adms_llm(
        model, compressor_type=compressor, importance_metric="noted", **settings
    )
    # Each layer is asked by itself at the turn, but only one compares.
    asked = comparing_layers(list(range(LAYERS)))
    assert len(asked) == 1
    true: list[torch.Tensor] = []
    projection = model.model.layers[min(asked)].self_attn.k_proj

    def note(_module: Any, _given: Any, found: torch.Tensor) -> None:
        # Texts of the model's own, for its basis, have more rows.
        if len(found) == ROWS:
            true.append(found)

    handle = projection.register_forward_hook(note)
    first = random_ids(ROWS, 40)
    mask = torch.ones_like(first)
    # The second row is 11 tokens shorter.
    mask[1, :11] = 0
    with torch.no_grad():
        model(first, attention_mask=mask, past_key_values=cache)
    feed(model, random_ids(ROWS, 860, seed=1), cache, step if step > 1 else 20)
    feed(model, random_ids(ROWS, 30, seed=2), cache, step if step < 150 else 0)
    handle.remove()
    keys = torch.cat(true, dim=1).unflatten(2, (-1, model.config.head_dim)).transpose(1, 2)
    whole = [keys[0], keys[1, :, 11:]]
    turns = [call for call in shown if torch.equal(call[2].tokens, in_order(call[2]))]
    later = [call for call in shown if len(call[0].keys) == ROWS]
    assert len(turns) == ROWS and later
    coded_seen = False
    for entries, evidence, others in later:
        assert evidence.tokens is not None
        for row in range(ROWS):
            own = evidence.tokens[row][evidence.tokens[row] >= 0]
            torch.testing.assert_close(entries.keys[row, :, : len(own)], whole[row][:, own])
            there = others.tokens[row] >= 0
            places = others.tokens[row][there]
            assert int(places.min()) >= 4 and int(places.max()) < whole[row].shape[1]
            error = others.keys[row, :, there] - whole[row][:, places]
            # Codes come first, then the ring, then those that leave.
            start = len(others.tokens[row]) - len(evidence.tokens[row]) - cache.sizes.ring
            coded = (torch.arange(len(others.tokens[row])) < start)[there]
            assert error[:, ~coded].abs().max() < 1e-5
            assert set(own.tolist()) <= set(places[~coded].tolist())
            assert (~coded).sum() >= min(60, recent)
            if compressor in ("low_rank", "quantized") and coded.sum() > 20:
                coded_seen = True
                wrong = whole[row][:, places.roll(1)]
                lost = error[:, coded].square().sum()
                assert lost < 0.5 * (others.keys[row, :, there] - wrong)[:, coded].square().sum()
    assert coded_seen == (compressor in ("low_rank", "quantized"))
    for (_, _, others), row in zip(turns, whole, strict=True):
        torch.testing.assert_close(others.keys[0], row[:, others.tokens[0]])


def test_a_failed_token_is_not_among_the_others() -> None:
    """It lies in a slot whose own token has left; what is chosen later is as it would be."""
    model = tiny_llama(layers=1, trained=4096)
    ids = random_ids(1, 672)
    # The one that fails is the nearest of all to one that comes.
    ids[:, 540] = 5
    cache = enable_adms_llm(
        model,
        **{**SETTINGS, "compressed_budget": 160, "recent_size": 120, "prefill_chunk_size": 64},
    )
    feed(model, ids[:, :608], cache, 64)
    twin = copy.deepcopy(cache)

    def fail(*_given: Any) -> None:
        raise KeyError("a hook")

    handle = model.model.layers[0].mlp.register_forward_hook(fail)
    with pytest.raises(ForwardError), torch.no_grad():
        model(torch.tensor([[5]]), past_key_values=cache)
    handle.remove()
    for one in (cache, twin):
        feed(model, ids[:, 608:], one)
    assert torch.equal(cache.layers[0].middle.arena, twin.layers[0].middle.arena)


def test_many_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 3, 300, 4, generator=generator)
    tokens = torch.arange(300).expand(2, -1)
    plain = Evidence(None, lambda: Entries(keys, keys), torch.ones(2), torch.ones(2))
    shown = replace(plain, tokens=tokens, others=lambda: Others(keys, tokens))
    whole = rarity(Entries(keys, keys), shown)
    monkeypatch.setattr(adms.importance.rarity, "TOGETHER", 7)
    torch.testing.assert_close(rarity(Entries(keys, keys), shown), whole)


def test_rarity_is_the_distance_to_the_nearest_that_is_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64)
    other = torch.randn(2, 3, 9, 4, generator=generator, dtype=torch.float64)
    tokens = torch.tensor([[100, 101, 102, 103, 104], [300, 301, 302, -1, -1]])
    places = torch.tensor([[0, 50, 61, 62, 63, 139, 141, 142, -1], [280] * 7 + [341, -1]])
    evidence = Evidence(
        None,
        lambda: Entries(keys, keys),
        torch.ones(2),
        torch.ones(2),
        tokens=tokens,
        others=lambda: Others(other.float(), places),
    )
    found = rarity(Entries(keys.float(), keys.float()), evidence)
    for row in range(2):
        expected = {}
        for index, token in enumerate(tokens[row].tolist()):
            far = [
                float((keys[row, :, index] - other[row, :, at]).norm())
                for at, place in enumerate(places[row].tolist())
                if place >= 0 and abs(place - token) >= APART
            ]
            if token >= 0 and far:
                expected[index] = min(far)
        for index, distance in expected.items():
            assert float(found[row, index]) == pytest.approx(distance, rel=1e-5)
        for index in set(range(5)) - set(expected):
            mean = sum(expected.values()) / len(expected)
            assert float(found[row, index]) == pytest.approx(mean, rel=1e-5)
    halves = [slice(0, 1), slice(1, 2)]
    for half in halves:
        alone = replace(
            evidence.of_rows(half),
            tokens=tokens[half],
            others=lambda half=half: Others(other[half].float(), places[half]),
        )
        own = rarity(Entries(keys[half].float(), keys[half].float()), alone)
        torch.testing.assert_close(own, found[half])


def test_what_comes_again_is_not_rare_however_odd() -> None:
    """``novelty`` takes one of those that come every ninety tokens, ``rarity`` that of once."""
    generator = torch.Generator().manual_seed(0)
    keys = 0.3 * torch.randn(1, 1, 400, 32, generator=generator)
    odd = 2.0 * torch.randn(6, 32, generator=generator)
    # Six kinds, so that two main directions do not hold them all.
    again = torch.arange(20, 380, 15)
    keys[0, 0, again] += odd[torch.arange(len(again)) % 6]
    keys[0, 0, 203] += torch.randn(32, generator=generator)
    entries, places = Entries(keys, keys), torch.arange(400)[None]
    plain = Evidence(None, lambda: entries, torch.ones(1), torch.ones(1))
    shown = replace(plain, tokens=places, others=lambda: Others(keys, places))
    assert int(rarity(entries, shown).argmax()) == 203
    assert int(rarity(entries, plain).argmax()) in again.tolist()


def test_layers_that_compare_decide_with_a_share_of_the_others() -> None:
    scores = torch.randn(5, 1, 60, generator=torch.Generator().manual_seed(0))
    parts = []
    for layers, comparing in ((slice(0, 2), [1]), (slice(2, 5), [0])):
        own = scores[layers]
        records = torch.zeros(*own.shape, 3, dtype=torch.uint8)
        parts.append(
            [Candidates([0], records, torch.arange(60)[None], own, None, comparing=comparing)]
        )
    alike = copy.deepcopy(parts)
    settle(parts, [60, 60], ADMSConfig(coverage_priority=0.0))
    asked, others = scores[[1, 2]].mean(0), scores[[0, 3, 4]].mean(0)
    mean = (asked + ALONE_WEIGHT * others).expand(5, 1, 60)
    for part, layers in zip(alike, (slice(0, 2), slice(2, 5)), strict=True):
        part[0].scores, part[0].comparing = mean[layers], ()
    settle(alike, [60, 60], ADMSConfig(coverage_priority=0.0))
    for part, twin in zip(parts, alike, strict=True):
        assert part[0].present is not None and twin[0].present is not None
        torch.testing.assert_close(part[0].present.scores, twin[0].present.scores)


@pytest.mark.parametrize(
    ("layers", "expected"), [(1, [0]), (2, [1]), (12, [6]), (30, [8, 16, 24]), (32, [8, 17, 25])]
)
def test_which_layers_compare(layers: int, expected: list[int]) -> None:
    assert sorted(comparing_layers(list(range(layers)))) == expected


def test_short_caches_compare_nothing(shown: list[Any]) -> None:
    """Where hardly two tokens are far enough apart, layers see tokens alone."""
    model = tiny_llama(layers=LAYERS, trained=2048)
    settings = {**SETTINGS, "compressed_budget": 32, "recent_size": 32}
    cache = enable_adms_llm(model, importance_metric="noted", **settings)
    feed(model, random_ids(1, 300), cache, 16)
    assert not shown
