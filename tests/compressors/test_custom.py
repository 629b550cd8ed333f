"""Compressors from outside: the README's snippets, and what is said of objects that do not fit."""

import math
from typing import Any

import pytest
import torch

from adms import ADMSConfig, enable_adms_llm
from adms.compressors import (
    COMPRESSORS,
    Coder,
    Compressor,
    LayerContext,
    register_compressor,
    resolve_compressor,
)
from adms.compressors.custom import SimpleObject, adapt
from adms.compressors.quantized import QuantizedCoder
from adms.entries import Entries
from adms.errors import ADMSTypeError, ADMSValueError
from tests.compressors.material import SHAPE, attend, some_queries, tokens
from tests.compressors.tiny import feed, random_ids, tiny_llama


class EverySecond:
    """The simple form: keys [heads, tokens, size] and values in, fewer of both out."""

    def compress(self, keys: torch.Tensor, values: torch.Tensor) -> Any:
        return keys[:, ::2], values[:, ::2]


class FourBits:
    """The whole contract, without inheriting from it."""

    name = "four_bits"

    def bind(self, context: LayerContext, nbytes: int, config: ADMSConfig) -> Coder:
        return QuantizedCoder(context.shape, context.dtype, stages=4, nbytes=nbytes)


@pytest.fixture
def registered() -> Any:
    """Takes names out of the registry again."""
    names: list[str] = []
    yield names
    for name in names:
        COMPRESSORS._items.pop(name)


@pytest.mark.parametrize("made", [EverySecond, FourBits])
@pytest.mark.parametrize("by_name", [False, True])
def test_streams_with_an_object(made: Any, by_name: bool, registered: list[str]) -> None:
    """The README's two snippets: passed directly, or registered under a name."""
    chosen = made()
    if by_name:
        registered.append("mine")
        register_compressor("mine", chosen)
        chosen = "mine"
    model = tiny_llama()
    cache = enable_adms_llm(
        model, start_size=4, recent_size=64, compressed_budget=160, compressor_type=chosen
    )
    logits = feed(model, random_ids(1, 700), cache)
    assert logits.isfinite().all()
    middle = cache.summary()["middle"]
    assert middle["form"] == ("mine" if by_name else getattr(made, "name", "EverySecond"))
    assert middle["tokens"] > 160
    assert cache.nbytes <= cache.max_nbytes


def bound(inner: Any, nbytes: int = 10**5, dtype: torch.dtype = torch.float32) -> Coder:
    return adapt(inner).bind(LayerContext(SHAPE, dtype), nbytes, ADMSConfig(compressed_budget=512))


@pytest.mark.parametrize(("bits", "error"), [(8, 1e-2), (16, 1e-3)])
def test_simple_form_stores_what_the_object_returns(bits: int, error: float) -> None:
    inner = EverySecond()
    inner.storage_bits = bits  # type: ignore[attr-defined]
    coder, entries = bound(inner), tokens(0, 64)
    header = coder.fit(entries)
    found = coder.decode(header, coder.encode(header, entries))
    torch.testing.assert_close(found.keys, entries.keys[:, :, ::2], atol=4 * error, rtol=error)
    torch.testing.assert_close(found.values, entries.values[:, :, ::2], atol=4 * error, rtol=error)
    # Each stands for two.
    assert found.log_weight is not None
    torch.testing.assert_close(
        found.log_weight, torch.full((1, 2, 32), math.log(2)), atol=1e-3, rtol=0
    )


def test_simple_form_of_equal_tokens_attends_as_they_do() -> None:
    one, other = tokens(1, 32), tokens(2, 32)
    entries = Entries(
        torch.cat([one.keys[:, :, :1].expand(-1, -1, 32, -1), other.keys], 2),
        torch.cat([one.values[:, :, :1].expand(-1, -1, 32, -1), other.values], 2),
    )
    coder = bound(EverySecond())
    header = coder.fit(entries)
    found = coder.decode(header, coder.encode(header, entries))
    queries = some_queries(0)
    first = Entries(found.keys[:, :, :16], found.values[:, :, :16], found.log_weight[:, :, :16])  # type: ignore[index]
    exact = Entries(entries.keys[:, :, :32], entries.values[:, :, :32])
    torch.testing.assert_close(attend(queries, first), attend(queries, exact), atol=0.02, rtol=0.02)


class Varying:
    """Fewer entries for blocks of zeros than for noise."""

    def compress(self, keys: torch.Tensor, values: torch.Tensor) -> Any:
        kept = 2 if bool((keys == 0).all()) else 4
        return keys[:, :kept], values[:, :kept]


def test_fewer_entries_than_a_record_has_room_for() -> None:
    coder = bound(Varying())
    zeros = Entries(torch.zeros(1, 2, 32, 16), torch.ones(1, 2, 32, 8))
    header = coder.fit(zeros)
    found = coder.decode(header, coder.encode(header, zeros))
    assert coder.entries_per_record == 4
    assert found.log_weight is not None
    weights = found.log_weight.exp()
    torch.testing.assert_close(weights[0, 0], torch.tensor([16.0, 16.0, 0, 0]), atol=0.05, rtol=0)
    output = attend(some_queries(0), found)
    torch.testing.assert_close(output, torch.ones_like(output), atol=0.02, rtol=0)


def returning(result: Any) -> Any:
    class Odd:
        def compress(self, keys: torch.Tensor, values: torch.Tensor) -> Any:
            return result(keys, values)

    return Odd()


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda k, v: k, ADMSTypeError, r"M in 1\.\.31, got Tensor"),
        (lambda k, v: (k, v), ADMSValueError, r"got \(2, 32, 16\) and \(2, 32, 8\)"),
        (lambda k, v: (k[:, :4], v[:, :3]), ADMSValueError, r"got \(2, 4, 16\) and \(2, 3, 8\)"),
        (lambda k, v: (k[:, :0], v[:, :0]), ADMSValueError, r"got \(2, 0, 16\)"),
        (lambda k, v: (k[0], v[0]), ADMSValueError, r"got \(32, 16\)"),
        (lambda k, v: (k[:, :4] * torch.nan, v[:, :4]), ADMSValueError, "returned NaN"),
        (lambda k, v: (1, 2), ADMSTypeError, "must return keys"),
    ],
)
def test_results_that_do_not_fit_are_named(result: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        bound(returning(result))


def test_more_entries_than_for_noise_are_refused() -> None:
    grows = returning(lambda k, v: (k[:, :3], v[:, :3]) if (k > 99).any() else (k[:, :2], v[:, :2]))
    coder = bound(grows)
    entries = Entries(torch.full((1, 2, 32, 16), 100.0), torch.zeros(1, 2, 32, 8))
    with pytest.raises(ADMSValueError, match="returned 3 entries for a block, but 2 for one of"):
        coder.encode(coder.fit(entries), entries)


@pytest.mark.parametrize(
    ("attribute", "value", "error"),
    [
        ("storage_bits", 4, ADMSValueError),
        ("block_tokens", 1, ADMSValueError),
        ("block_tokens", "8", ADMSTypeError),
    ],
)
def test_attributes_are_checked(attribute: str, value: Any, error: type) -> None:
    inner = EverySecond()
    setattr(inner, attribute, value)
    with pytest.raises(error, match=attribute):
        SimpleObject(inner)


def test_block_tokens_of_the_object_count() -> None:
    inner = EverySecond()
    inner.block_tokens = 6  # type: ignore[attr-defined]
    coder = bound(inner)
    assert (coder.block_tokens, coder.entries_per_record) == (6, 3)


class Greedy(FourBits):
    def bind(self, context: LayerContext, nbytes: int, config: ADMSConfig) -> Coder:
        return QuantizedCoder(context.shape, context.dtype, stages=4, nbytes=2 * nbytes)


class Shapeless(FourBits):
    def bind(self, context: LayerContext, nbytes: int, config: ADMSConfig) -> Any:
        return "coder"


class Undeclared(FourBits):
    def block_tokens(self, config: ADMSConfig) -> int:
        return 4


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (Greedy, ADMSValueError, "was given 100000 bytes and returned a coder of"),
        (Shapeless, ADMSTypeError, "must return an adms.compressors.Coder, got 'coder'"),
        (Undeclared, ADMSValueError, "codes 1 tokens together, its compressor declares 4"),
    ],
)
def test_coders_that_break_the_contract_are_refused(made: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        bound(made())


def test_resolving_names_and_objects() -> None:
    resolved = resolve_compressor(ADMSConfig(compressor_type="vq"))
    assert isinstance(resolved, Compressor) and resolved.name == "vq"
    assert resolve_compressor(ADMSConfig(compressor_type="vq", compressed_budget=0)) is None
    inner = EverySecond()
    wrapped = resolve_compressor(ADMSConfig(compressor_type=inner))
    assert isinstance(wrapped, SimpleObject) and wrapped.inner is inner
    with pytest.raises(ADMSValueError, match="did you mean 'summary'"):
        resolve_compressor(ADMSConfig(compressor_type="sumary"))
    with pytest.raises(ADMSValueError, match="rank was given, but compressor 'vq' does not use it"):
        resolve_compressor(ADMSConfig(compressor_type="vq", rank=8))
    with pytest.raises(ADMSValueError, match="num_clusters was given.*choose one of: vq"):
        resolve_compressor(ADMSConfig(compressor_type=inner, num_clusters=8))


def test_what_is_no_compressor_is_refused(registered: list[str]) -> None:
    for wrong in (7, EverySecond, FourBits):
        with pytest.raises(ADMSTypeError, match=r"bind\(context, nbytes, config\) or compress"):
            adapt(wrong)
    registered.append("seven")
    register_compressor("seven", 7)  # type: ignore[arg-type]
    with pytest.raises(ADMSTypeError, match="compressor_type must be a name"):
        resolve_compressor(ADMSConfig(compressor_type="seven"))
