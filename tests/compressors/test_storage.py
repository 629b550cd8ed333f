"""Weighted entries in bytes."""

import pytest
import torch

from adms.compressors.storage import ABSENT, CodedStorage, EntryStorage, PlainStorage
from adms.entries import Entries, TokenShape
from tests.compressors.material import SHAPE, tokens


def weighted(count: int, shape: TokenShape = SHAPE) -> Entries:
    entries = tokens(0, count, shape)
    weight = torch.linspace(-2, 6, shape.num_heads * count).view(1, shape.num_heads, count)
    weight[0, 0, 0] = ABSENT
    return Entries(entries.keys, entries.values, weight)


def relative(exact: torch.Tensor, stored: torch.Tensor) -> float:
    return float((exact - stored).square().mean() / exact.square().mean())


STORAGES: list[tuple[EntryStorage, float]] = [
    (PlainStorage(SHAPE, torch.float32, 16), 1e-6),
    (PlainStorage(SHAPE, torch.float32, 8), 1e-4),
    (CodedStorage(SHAPE, torch.float32, 4), 0.02),
    (CodedStorage(SHAPE, torch.float32, 6), 0.003),
]


@pytest.mark.parametrize(("storage", "error"), STORAGES)
def test_what_is_written_is_read(storage: EntryStorage, error: float) -> None:
    entries = weighted(12)
    header = storage.fit(entries)
    data = storage.write(header, entries)
    assert header.shape == (1, storage.header_bytes)
    assert data.shape == (1, 12, storage.entry_bytes) and data.dtype == torch.uint8
    found = storage.read(header, data)
    assert relative(entries.keys, found.keys) < error
    assert relative(entries.values, found.values) < error
    assert found.log_weight is not None and entries.log_weight is not None
    torch.testing.assert_close(found.log_weight, entries.log_weight, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("bits", [8, 16])
def test_one_head_and_one_entry(bits: int) -> None:
    shape = TokenShape(1, 4, 1)
    storage = PlainStorage(shape, torch.float32, bits)
    entries = weighted(1, shape)
    found = storage.read(storage.fit(entries), storage.write(storage.fit(entries), entries))
    torch.testing.assert_close(found.keys, entries.keys, atol=0.02, rtol=0)
    torch.testing.assert_close(found.values, entries.values, atol=0.02, rtol=0)


def test_bfloat16_is_kept_as_it_is() -> None:
    entries = weighted(5)
    exact = Entries(entries.keys.bfloat16() * 1e6, entries.values.bfloat16(), entries.log_weight)
    storage = PlainStorage(SHAPE, torch.bfloat16, 16)
    found = storage.read(storage.fit(exact), storage.write(storage.fit(exact), exact))
    assert torch.equal(found.keys, exact.keys) and torch.equal(found.values, exact.values)


def test_absent_entries_get_no_attention_in_any_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        scores = torch.tensor([0.0, ABSENT]).to(dtype)
        assert scores.isfinite().all()
        assert scores.softmax(0).tolist() == [1.0, 0.0]


def test_a_single_code_of_odd_length() -> None:
    shape = TokenShape(1, 8, 8)
    storage = CodedStorage(shape, torch.float32, 5)
    entries = weighted(1, shape)
    found = storage.read(storage.fit(entries), storage.write(storage.fit(entries), entries))
    torch.testing.assert_close(found.keys, entries.keys, atol=0.02, rtol=0.02)
