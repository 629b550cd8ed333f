"""What every registered compressor promises, whatever it does inside."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adms.compressors import COMPRESSORS, LayerContext
from adms.config import ADMSConfig
from adms.entries import Entries, TokenShape
from adms.errors import ADMSValueError
from tests.compressors.material import (
    NAMES,
    SHAPE,
    attend,
    bind,
    code,
    rows_of,
    some_queries,
    tokens,
)

BUDGET = 96
EVERY = pytest.mark.parametrize("name", NAMES)
SHAPES = [SHAPE, TokenShape(1, 8, 8), TokenShape(3, 20, 12)]


def test_the_compressors_of_the_design_are_there() -> None:
    assert set(NAMES) >= {"attention_matching", "low_rank", "pq", "quantized", "summary", "vq"}


def degenerate(kind: str, count: int, shape: TokenShape = SHAPE) -> Entries:
    entries = tokens(0, count, shape)
    keys, values = entries.keys, entries.values
    match kind:
        case "zeros":
            return Entries(torch.zeros_like(keys), torch.zeros_like(values))
        case "identical":
            return Entries(keys[:, :, :1].expand_as(keys), values[:, :, :1].expand_as(values))
        case "one stands out":
            keys, values = keys.clone(), values.clone()
            keys[:, :, 3] *= 1e3
            values[:, :, 5] *= 1e3
            return Entries(keys, values)
        case "huge":
            return Entries(keys * 1e4, values * 1e4)
        case "tiny":
            return Entries(keys * 1e-9, values * 1e-9)
    raise AssertionError(kind)


@EVERY
@pytest.mark.parametrize("kind", ["zeros", "identical", "one stands out", "huge", "tiny"])
def test_finite_on_degenerate_input(name: str, kind: str) -> None:
    for shape in SHAPES:
        coder = bind(name, BUDGET, shape)
        blocks = max(2, 8 // coder.block_tokens)
        entries = degenerate(kind, blocks * coder.block_tokens, shape)
        queries = some_queries(0, heads=2 * shape.num_heads, shape=shape)
        header = coder.fit(entries, queries)
        decoded = coder.decode(header, coder.encode(header, entries, queries))
        for part in (decoded.keys, decoded.values, decoded.log_weight):
            assert part is None or part.isfinite().all()
        error = (attend(queries, decoded) - attend(queries, entries)).abs().amax()
        # What attention reads stays within the values' size, twice over.
        assert error <= 2 * entries.values.abs().amax() + 1e-6


@EVERY
def test_identical_tokens_are_restored(name: str) -> None:
    coder = bind(name, BUDGET)
    entries = degenerate("identical", 2 * coder.block_tokens)
    queries = some_queries(0)
    header = coder.fit(entries, queries)
    decoded = coder.decode(header, coder.encode(header, entries, queries))
    actual, expected = attend(queries, decoded), attend(queries, entries)
    torch.testing.assert_close(actual, expected, atol=0.02, rtol=0.02)
    # Together the entries weigh what the tokens do.
    if decoded.log_weight is not None:
        weight = decoded.log_weight.exp().sum(2)
        torch.testing.assert_close(
            weight, torch.full_like(weight, entries.num_entries), atol=0.1, rtol=0.01
        )


@EVERY
def test_one_block_alone(name: str) -> None:
    """The fewest tokens there can be: one, or one block."""
    coder = bind(name, BUDGET)
    entries, queries = tokens(3, coder.block_tokens), some_queries(3, count=1)
    header = coder.fit(entries, queries)
    records = coder.encode(header, entries, queries)
    assert records.shape == (1, 1, coder.fine_bytes or coder.record_bytes)
    decoded = coder.decode(header, records)
    assert decoded.num_entries == coder.entries_per_record
    assert decoded.keys.isfinite().all() and decoded.values.isfinite().all()


@EVERY
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["keys", "values"])
def test_what_is_not_finite_is_refused(name: str, bad: float, where: str) -> None:
    entries = tokens(0, 32)
    getattr(entries, where)[0, 1, 7, 2] = bad
    with pytest.raises(ADMSValueError, match=f"{where} hold NaN or infinity"):
        COMPRESSORS.get(name).compress(entries, 10**6, queries=some_queries(0))


@EVERY
def test_enough_bytes_hold_the_tokens_exactly(name: str) -> None:
    entries = tokens(1, 40)
    exact = 40 * SHAPE.num_elements * 4
    block = COMPRESSORS.get(name).compress(entries, exact, queries=some_queries(1))
    decoded = block.decode()
    assert torch.equal(decoded.keys, entries.keys)
    assert torch.equal(decoded.values, entries.values)
    assert decoded.log_weight is None
    assert block.nbytes == exact


@EVERY
def test_compress_takes_what_it_says_and_no_more_than_it_may(name: str) -> None:
    compressor = COMPRESSORS.get(name)
    config = ADMSConfig(compressor_type=name)
    count = 512 // compressor.block_tokens(config) * compressor.block_tokens(config)
    nbytes = count * SHAPE.num_elements  # a quarter of float32
    block = compressor.compress(tokens(2, count), nbytes, queries=some_queries(2), config=config)
    coder = block.coder
    assert block.header.dtype == block.records.dtype == torch.uint8
    assert block.nbytes == coder.header_bytes + count // coder.block_tokens * coder.record_bytes
    assert block.nbytes <= nbytes
    assert block.num_tokens == count
    assert block.decode().num_entries == count // coder.block_tokens * coder.entries_per_record


@EVERY
def test_too_few_bytes_are_refused(name: str) -> None:
    with pytest.raises(ADMSValueError, match="give more bytes or whole blocks"):
        COMPRESSORS.get(name).compress(tokens(0, 64), 100, queries=some_queries(0))


@EVERY
@settings(max_examples=60)
@given(
    nbytes=st.integers(0, 200_000),
    heads=st.integers(1, 4),
    key_dim=st.integers(1, 33),
    value_dim=st.integers(1, 33),
    budget=st.integers(16, 512),
)
def test_a_coder_never_takes_more_bytes_than_given(
    name: str, nbytes: int, heads: int, key_dim: int, value_dim: int, budget: int
) -> None:
    compressor = COMPRESSORS.get(name)
    config = ADMSConfig(compressed_budget=budget)
    shape = TokenShape(heads, key_dim, value_dim)
    coder = compressor.bind(LayerContext(shape), nbytes, config)
    assert coder.capacity == 0 or coder.nbytes <= nbytes
    assert coder.block_tokens == compressor.block_tokens(config) <= budget
    assert 1 <= coder.entries_per_record <= coder.block_tokens


@EVERY
@settings(max_examples=12)
@given(seed=st.integers(0, 2**16), blocks=st.integers(1, 6), scale=st.floats(1e-3, 1e3))
def test_records_have_their_size_and_decode_to_finite_entries(
    name: str, seed: int, blocks: int, scale: float
) -> None:
    coder = bind(name, BUDGET)
    entries = tokens(seed, blocks * coder.block_tokens)
    entries = Entries(entries.keys * scale, entries.values * scale)
    queries = some_queries(seed)
    header = coder.fit(entries, queries)
    assert header.shape == (1, coder.header_bytes) and header.dtype == torch.uint8
    records = coder.encode(header, entries, queries)
    size = coder.fine_bytes or coder.record_bytes
    assert records.shape == (1, blocks, size) and records.dtype == torch.uint8
    decoded = coder.decode(header, records)
    assert decoded.keys.shape == (1, 2, blocks * coder.entries_per_record, 16)
    assert decoded.values.shape == (1, 2, blocks * coder.entries_per_record, 8)
    assert decoded.keys.isfinite().all() and decoded.values.isfinite().all()


@EVERY
def test_a_batch_is_its_rows(name: str) -> None:
    coder = bind(name, BUDGET)
    count = 4 * coder.block_tokens
    parts = [tokens(seed, count) for seed in range(3)]
    queries = [some_queries(seed) for seed in range(3)]
    headers = [coder.fit(part, query) for part, query in zip(parts, queries, strict=True)]
    together = coder.decode(
        torch.cat(headers), coder.encode(torch.cat(headers), rows_of(parts), torch.cat(queries))
    )
    for row in range(3):
        alone = coder.decode(headers[row], coder.encode(headers[row], parts[row], queries[row]))
        torch.testing.assert_close(together.keys[row], alone.keys[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.values[row], alone.values[0], atol=1e-4, rtol=1e-4)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_decodes_to_the_models_dtype(name: str, dtype: torch.dtype) -> None:
    coder = bind(name, BUDGET, dtype=dtype)
    exact = tokens(0, coder.block_tokens)
    entries = Entries(exact.keys.to(dtype), exact.values.to(dtype))
    queries = some_queries(0).to(dtype)
    header = coder.fit(entries, queries)
    decoded = coder.decode(header, coder.encode(header, entries, queries))
    assert decoded.keys.dtype == decoded.values.dtype == dtype


@EVERY
def test_error_falls_with_the_budget(name: str) -> None:
    """In the mean over 50 inputs; it ends at nothing where the budget holds everything."""
    parts = [tokens(seed, 160) for seed in range(50)]
    queries = [some_queries(seed) for seed in range(50)]
    later = torch.cat([some_queries(seed, count=32)[:, :, 24:] for seed in range(50)])
    exact = attend(later, rows_of(parts))
    scale = exact.square().mean((1, 2, 3))
    errors = []
    for budget in (20, 40, 80, 160):
        coded = code(name, parts, queries, budget)
        error = (attend(later, coded.entries) - exact).square().mean((1, 2, 3)) / scale
        errors.append(float(error.mean()))
    assert errors == sorted(errors, reverse=True), errors
    assert errors[-1] == 0.0
    # Half of the bytes leave less than what dropping half of the tokens does.
    dropped = Entries(*(part[:, :, 80:] for part in (rows_of(parts).keys, rows_of(parts).values)))
    lost = (attend(later, dropped) - exact).square().mean((1, 2, 3)) / scale
    assert errors[-2] < float(lost.mean())
