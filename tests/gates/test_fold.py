"""Folding and the coder around it, against plain loops and exact attention."""

import math

import pytest
import torch

from adms.compressors import COMPRESSORS, LayerContext, RawCoder
from adms.config import ADMSConfig
from adms.entries import Entries
from adms.errors import ADMSValueError
from adms.gates import AdaptiveUpdateConfig, UpdateGates
from adms.gates.coder import GatedCoder, GatedCompressor
from adms.gates.fold import choose_hosts, fold, token_distance
from adms.gates.learned import log_importance
from tests.compressors.material import NAMES, SHAPE, attend, some_queries, tokens

T, M = 8, 5
FEATURES = SHAPE.num_elements
RAW_BYTES = 2 * FEATURES


def blocks(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    entries = tokens(seed, count)
    return entries.keys.unflatten(2, (-1, T)), entries.values.unflatten(2, (-1, T))


def slow_hosts(distance: torch.Tensor, admitted: int, importance: torch.Tensor) -> list[int]:
    """One block, folded by the definition."""
    own = list(range(len(distance)))
    for _ in range(len(distance) - admitted):
        pairs = [(float(distance[t, h] * importance[t]), t) for t in own for h in own if h != t]
        own.remove(min(pairs)[1])
    return [
        t if t in own else min(own, key=lambda h: float(distance[t, h]))
        for t in range(len(distance))
    ]


@pytest.mark.parametrize("admitted", [5, 2, 1])
@pytest.mark.parametrize("weighed", [False, True])
def test_hosts_are_those_of_the_definition(weighed: bool, admitted: int) -> None:
    keys, values = blocks(0, 6 * T)
    distance = token_distance(keys, values)
    scores = torch.randn(1, 6, T) if weighed else None
    hosts = choose_hosts(distance, admitted, scores)
    for block in range(6):
        importance = torch.ones(T) if scores is None else scores[0, block].exp()
        assert hosts[0, block].tolist() == slow_hosts(distance[0, block], admitted, importance)
        kept = hosts[0, block] == torch.arange(T)
        assert int(kept.sum()) == admitted
        assert bool(kept[hosts[0, block]].all()), "a token was folded into a folded one"


def test_an_entry_is_one_of_its_tokens_in_the_order_of_the_text() -> None:
    keys, values = blocks(1, 3 * T)
    hosts = choose_hosts(token_distance(keys, values), M)
    folded = fold(keys, values, hosts, M)
    for block in range(3):
        own = hosts[0, block]
        kept = [t for t in range(T) if own[t] == t]
        assert torch.equal(folded.keys[0, :, block], keys[0, :, block, kept])
        assert torch.equal(folded.values[0, :, block], values[0, :, block, kept])
        for index, token in enumerate(kept):
            assert torch.equal(folded.members[0, block] == index, own == token)


def test_duplicates_fold_without_loss() -> None:
    """Three copies of a token are one entry of weight log 3."""
    single = tokens(2, 4)
    repeated = Entries(
        single.keys.repeat_interleave(torch.tensor([3, 1, 1, 3]), dim=2),
        single.values.repeat_interleave(torch.tensor([3, 1, 1, 3]), dim=2),
    )
    coder = GatedCoder(RawCoder(SHAPE, torch.float32, 100), T, 4, None)
    header = coder.fit(repeated)
    read = coder.decode(header, coder.encode(header, repeated))
    torch.testing.assert_close(
        read.log_weight, torch.tensor([3.0, 1.0, 1.0, 3.0]).log().expand(1, 2, 4)
    )
    queries = some_queries(0)
    torch.testing.assert_close(attend(queries, read), attend(queries, repeated))


def test_a_learned_gate_protects_what_it_weighs() -> None:
    """A token that would be folded first keeps its own entry once the gate values it."""
    entries = tokens(3, T)
    keys, values = entries.keys[:, :, None], entries.values[:, :, None]
    distance = token_distance(keys, values)
    first = int((choose_hosts(distance, T - 1)[0, 0] != torch.arange(T)).nonzero()[0, 0])
    features = [log_importance(unit, keys, values)[0, 0] for unit in torch.eye(FEATURES)]
    wanted = 5.0 * (torch.arange(T) == first)
    gate = torch.linalg.lstsq(torch.stack(features, 1), wanted[:, None]).solution[:, 0]
    found = []
    for own in (None, gate):
        coder = GatedCoder(RawCoder(SHAPE, torch.float32, 100), T, T - 1, own)
        header = coder.fit(entries)
        read = coder.decode(header, coder.encode(header, entries))
        found.append(int((read.keys[0] == entries.keys[0, :, first, None]).all(-1).all(0).sum()))
    assert found == [0, 1]


@pytest.mark.parametrize("name", NAMES)
def test_every_compressor_behind_a_gate(name: str) -> None:
    """Within its bytes, more tokens than alone, and each block weighs what its tokens do."""
    update = AdaptiveUpdateConfig(admission=0.6)
    config = ADMSConfig(compressor_type=name, compressed_budget=256)
    inner = COMPRESSORS.get(name)
    gated = GatedCompressor(inner, update)
    context = LayerContext(SHAPE, torch.float32)
    nbytes = 256 * RAW_BYTES
    alone, coder = inner.bind(context, nbytes, config), gated.bind(context, nbytes, config)
    assert coder.block_tokens == gated.block_tokens(config)
    assert coder.nbytes <= nbytes
    assert coder.capacity >= 1.3 * alone.capacity
    count = 4 * coder.block_tokens
    entries = tokens(4, count)
    header = coder.fit(entries, some_queries(0))
    assert header.shape == (1, coder.header_bytes)
    records = coder.encode(header, entries, some_queries(0))
    assert records.shape == (1, 4, coder.record_bytes)
    read = coder.decode(header, records)
    assert read.num_entries == 4 * coder.entries_per_record
    assert read.log_weight.isfinite().all()
    if coder.folds_once:
        mass = read.log_weight.exp().sum(2)
        torch.testing.assert_close(mass, torch.full_like(mass, count))
    else:
        own = inner.bind(context, nbytes, config)
        found = own.decode(header, coder.inner_view(records))
        more = math.log(coder.block_tokens / coder.admitted)
        torch.testing.assert_close(read.log_weight, found.log_weight + more)
    if coder.num_coarse:
        cut = coder.decode(header, records[..., : coder.coarse_bytes])
        torch.testing.assert_close(cut.log_weight, read.log_weight)


@pytest.mark.parametrize("name", ["quantized", "low_rank"])
@pytest.mark.parametrize("learned", [False, True])
def test_layers_are_coded_together_as_each_alone(name: str, learned: bool) -> None:
    config = ADMSConfig(compressor_type=name, compressed_budget=256)
    gated = GatedCompressor(COMPRESSORS.get(name), AdaptiveUpdateConfig())
    nbytes, rows = 256 * RAW_BYTES, 2
    coders, headers, parts = [], [], []
    for layer in range(3):
        gate = torch.randn(FEATURES, generator=torch.Generator().manual_seed(layer))
        context = LayerContext(SHAPE, torch.float32, layer, gate=gate if learned else None)
        coders.append(gated.bind(context, nbytes, config))
        for row in range(rows):
            parts.append(tokens(10 * layer + row, 2 * coders[0].block_tokens))
            headers.append(coders[layer].fit(parts[-1]))
    header = torch.cat(headers)
    entries = Entries(*(torch.cat(states) for states in zip(*map(both, parts), strict=True)))
    together = coders[0].stacked(coders)
    records = together.encode(header, entries)
    read = together.decode(header, records)
    for index, (own, part) in enumerate(zip(headers, parts, strict=True)):
        coder = coders[index // rows]
        alone = coder.encode(own, part)
        assert torch.equal(records[index : index + 1], alone)
        torch.testing.assert_close(read.keys[index : index + 1], coder.decode(own, alone).keys)


def both(entries: Entries) -> tuple[torch.Tensor, torch.Tensor]:
    return entries.keys, entries.values


def test_rows_and_blocks_do_not_depend_on_each_other() -> None:
    config = ADMSConfig()
    gated = GatedCompressor(COMPRESSORS.get("quantized"), AdaptiveUpdateConfig(block_tokens=16))
    coder = gated.bind(LayerContext(SHAPE, torch.float32), 256 * RAW_BYTES, config)
    first, second = tokens(5, 64), tokens(6, 64)
    header = coder.fit(first)
    both = Entries(torch.cat([first.keys, second.keys]), torch.cat([first.values, second.values]))
    together = coder.encode(header.expand(2, -1), both)
    late = Entries(second.keys[:, :, 16:32], second.values[:, :, 16:32])
    assert torch.equal(together[:1], coder.encode(header, first))
    assert torch.equal(together[1:, 1:2], coder.encode(header, late))


@pytest.mark.parametrize(("budget", "block"), [(1000, 64), (252, 63), (64, 16), (4, 2)])
def test_what_waits_is_at_most_a_quarter_of_the_budget(budget: int, block: int) -> None:
    tokens, admitted = AdaptiveUpdateConfig().block_sizes(1, budget)
    assert tokens == block
    assert max(1, int(0.6 * block)) == admitted
    assert AdaptiveUpdateConfig(block_tokens=16).block_sizes(1, budget) == (16, 9)
    gates = UpdateGates((torch.zeros(1),) * 2, (1.0, 0.5), 32, {}, {})
    learned = AdaptiveUpdateConfig(policy="learned", gates=gates)
    own = min(block, 32)
    assert learned.block_sizes(1, budget, 0) == (own, own)
    assert learned.block_sizes(1, budget, 1) == (own, own // 2)


def test_a_landmark_of_a_folded_block_is_as_fine_as_ever() -> None:
    inner = COMPRESSORS.get("low_rank")
    gated = GatedCompressor(inner, AdaptiveUpdateConfig(block_tokens=T))
    config, context = ADMSConfig(compressed_budget=256), LayerContext(SHAPE, torch.float32)
    coder, alone = (each.bind(context, 256 * RAW_BYTES, config) for each in (gated, inner))
    entries = tokens(8, 4 * T)
    header = coder.fit(entries)
    records = coder.encode(header, entries)
    fine = coder.encode_fine(header, entries, records)
    assert coder.fine_bytes == alone.fine_bytes == fine.shape[2] > alone.record_bytes
    read, expected = coder.decode_fine(header, fine), alone.decode(header, fine)
    assert torch.equal(read.keys, expected.keys)
    near, far = (
        (each.keys - entries.keys).square().mean()
        for each in (read, alone.decode(header, fine[..., : alone.record_bytes]))
    )
    assert near < far


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"admission": 0.05}, r"admission must lie in 0\.1\.\.1, got 0\.05"),
        ({"admission": 1.5}, "admission must lie in"),
        ({"block_tokens": 1}, r"block_tokens must lie in 2\.\.128, got 1"),
        ({"policy": "novelty"}, "policy must be one of similarity, learned"),
        ({"policy": "learned"}, "needs gates"),
        ({"gates": "file"}, 'gates belong to policy="learned"'),
        ({"policy": "learned", "gates": "/no/such/file"}, "cannot be read as gates"),
        ({"policy": "learned", "gates": "x", "admission": 0.6}, "leave it out"),
    ],
)
def test_a_bad_configuration_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ADMSValueError, match=message):
        AdaptiveUpdateConfig(**given)


def test_gates_come_back_from_their_file(tmp_path: pytest.TempPathFactory) -> None:
    from tests.compressors.tiny import tiny_llama

    model = tiny_llama()
    gates = UpdateGates.untrained(model)
    path = tmp_path / "gates.safetensors"
    gates.save(path)
    again = UpdateGates.load(path)
    assert vars(again).keys() == vars(gates).keys()
    assert (again.admissions, again.block_tokens, again.model, again.samples) == (
        (1.0,) * len(gates.weights),
        16,
        gates.model,
        gates.samples,
    )
    assert all(
        torch.equal(mine, other) for mine, other in zip(gates.weights, again.weights, strict=True)
    )
    path.write_bytes(b"something else")
    with pytest.raises(ADMSValueError, match="cannot be read as gates"):
        UpdateGates.load(path)
