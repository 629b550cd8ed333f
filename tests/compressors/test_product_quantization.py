"""``pq`` against a search through all its words in float64."""

import torch

from adms.compressors import LayerContext
from adms.compressors.product_quantization import PQCoder
from adms.config import ADMSConfig
from adms.entries import Entries, TokenShape
from tests.compressors.material import SHAPE, tokens


def coder_of(shape: TokenShape = SHAPE) -> PQCoder:
    return PQCoder(LayerContext(shape), 10**6, ADMSConfig(compressor_type="pq"))


def test_every_group_gets_its_nearest_word() -> None:
    coder, entries = coder_of(), tokens(0, 64)
    header = coder.fit(entries)
    decoded = coder.decode(header, coder.encode(header, entries))
    words = coder._words(header).double()[0]
    groups, found = coder._groups(entries).double()[0], coder._groups(decoded).double()[0]
    best = torch.cdist(groups, words).amin(2)
    torch.testing.assert_close((groups - found).norm(dim=2), best, atol=1e-5, rtol=1e-4)


def test_few_distinct_tokens_are_kept() -> None:
    distinct = tokens(1, 16)
    entries = Entries(distinct.keys.repeat(1, 1, 4, 1), distinct.values.repeat(1, 1, 4, 1))
    coder = coder_of()
    header = coder.fit(entries)
    decoded = coder.decode(header, coder.encode(header, entries))
    error = (decoded.keys - entries.keys).square().mean() / entries.keys.var()
    assert error < 0.01


def test_two_bits_leave_a_tenth_of_the_variance() -> None:
    coder, entries = coder_of(), tokens(2, 512)
    header = coder.fit(entries)
    decoded = coder.decode(header, coder.encode(header, entries))
    for exact, coded in ((entries.keys, decoded.keys), (entries.values, decoded.values)):
        assert (exact - coded).square().mean() < 0.1 * exact.var(2, keepdim=True).mean()
    assert coder.record_bytes == SHAPE.num_elements // 4


def test_head_sizes_that_are_no_multiples_of_four() -> None:
    shape = TokenShape(3, 6, 5)
    coder, entries = coder_of(shape), tokens(3, 40, shape)
    header = coder.fit(entries)
    decoded = coder.decode(header, coder.encode(header, entries))
    assert decoded.keys.shape == entries.keys.shape
    assert (entries.values - decoded.values).square().mean() < 0.1 * entries.values.var()


def test_only_the_last_tokens_are_fitted_on() -> None:
    coder = PQCoder(LayerContext(SHAPE), 10**6, ADMSConfig(svd_max_tokens=32))
    entries = tokens(4, 80)
    last = Entries(entries.keys[:, :, -32:], entries.values[:, :, -32:])
    assert torch.equal(coder.fit(entries), coder.fit(last))
