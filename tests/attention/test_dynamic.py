"""Tests of DynamicAttention against dense softmax attention in float64."""

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adms.attention.dynamic import DynamicAttention
from adms.errors import ADMSTypeError, ADMSValueError

LEADS = [(), (3,), (2, 3)]


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The oracle: softmax attention in float64 (or autograd's, for gradients)."""
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(q @ k.transpose(-1, -2) * scale, -1) @ v


def mean_size(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """What the promised precision is relative to: the weighted mean of |v|, [..., Q, 1]."""
    return dense(q, k, v.abs().amax(-1, keepdim=True), scale)


def make(
    lead: tuple[int, ...] = (),
    rows: int = 5,
    entries: int = 7,
    *,
    dtype: torch.dtype,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, size: int) -> Tensor:
        return torch.randn(*lead, count, size, generator=generator, dtype=dtype)

    return draw(rows, 4), draw(entries, 4), draw(entries, 3)


def assert_exact(attention: DynamicAttention, q: Tensor, scale: float | None, bound: float) -> None:
    got = attention.output()
    expected = dense(q, attention.keys, attention.values, scale)
    size = mean_size(q, attention.keys, attention.values, scale)
    error = (got.double() - expected).abs() / size.clamp(min=1e-300)
    assert error.max() <= bound, float(error.max())


OPERATION = st.tuples(
    st.sampled_from(["key", "value", "both", "append", "delete", "read", "rows", "flush"]),
    st.integers(0, 10**6),
    st.sampled_from([0.0, 1e-3, 1.0, 8.0]),
)


def apply(
    attention: DynamicAttention, name: str, number: int, size: float, lead: tuple[int, ...]
) -> None:
    """One operation on a model of the entries that needs no second implementation of ids."""
    generator = torch.Generator().manual_seed(number)
    dtype = attention.keys.dtype
    key = torch.randn(*lead, 4, generator=generator, dtype=dtype)
    # Scores within +-20 for queries of norm 4 at scale 1/2 need keys of norm up to 10.
    key = key / key.norm(dim=-1, keepdim=True).clamp(min=1e-9) * min(size, 8.0)
    value = torch.randn(*lead, 3, generator=generator, dtype=dtype) * (1 + 1e4 * (size == 8.0))
    chosen = attention.ids[number % attention.num_entries]
    if name in ("key", "both"):
        attention.update_key(chosen, key)
    if name in ("value", "both"):
        attention.update_value(chosen, value)
    if name == "append":
        attention.append(key, value)
    if name == "delete" and attention.num_entries > 1:
        attention.delete(chosen)
    if name == "read":
        attention.output()
    if name == "rows":
        attention.output(rows=[number % 5])
    if name == "flush":
        attention.flush()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    operations=st.lists(OPERATION, max_size=40),
    lead=st.sampled_from(LEADS),
    lazy_threshold=st.sampled_from([0, 1, 3, 8, 1000]),
    chunk_size=st.sampled_from([None, 1, 3, 64]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_dense_after_any_operations(
    operations: list[tuple[str, int, float]],
    lead: tuple[int, ...],
    lazy_threshold: int,
    chunk_size: int | None,
    dtype: torch.dtype,
) -> None:
    q, k, v = make(lead, dtype=dtype)
    q = 4.0 * q / q.norm(dim=-1, keepdim=True)
    attention = DynamicAttention(q, k, v, lazy_threshold, chunk_size=chunk_size)
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    for name, number, size in operations:
        apply(attention, name, number, size, lead)
    expected = dense(q, attention.keys, attention.values)
    sizes = mean_size(q, attention.keys, attention.values)
    partial = attention.output(rows=[3, 0])
    error = (partial.double() - expected[..., [3, 0], :]).abs() / sizes[..., [3, 0], :]
    assert error.max() <= bound
    assert_exact(attention, q, None, bound)
    assert attention.num_pending == 0


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_three_thousand_updates_do_not_drift(chunk_size: int | None) -> None:
    q, k, v = make((2,), rows=3, entries=6, dtype=torch.float64)
    attention = DynamicAttention(q, k, v, chunk_size=chunk_size)
    generator = torch.Generator().manual_seed(1)
    keys = 3 * torch.randn(3000, 2, 4, generator=generator, dtype=torch.float64)
    for step in range(3000):
        attention.update_key(step % 6, keys[step])
        attention.output()
    assert_exact(attention, q, None, 1e-12)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_of_ten_thousand_stay_finite_and_exact(
    dtype: torch.dtype, chunk_size: int | None
) -> None:
    """A dominant entry comes and goes; what it hid must come back exactly."""
    q = torch.ones(2, 4, dtype=dtype)
    k = torch.full((6, 4), -2500.0, dtype=dtype) + torch.arange(6, dtype=dtype)[:, None] / 8
    v = torch.arange(18, dtype=dtype).reshape(6, 3)
    attention = DynamicAttention(q, k, v, scale=1.0, chunk_size=chunk_size)
    for level in (2500.0, -2500.0, 0.0, -2499.5):
        attention.update_key(2, torch.full((4,), level, dtype=dtype))
        assert torch.isfinite(attention.output()).all()
        assert_exact(attention, q, 1.0, 1e-6 if dtype == torch.float32 else 1e-11)
    attention.append(torch.full((4,), 2500.0, dtype=dtype), v[0])
    attention.output()
    attention.delete(attention.ids[-1])
    assert_exact(attention, q, 1.0, 1e-6 if dtype == torch.float32 else 1e-11)


def test_a_large_value_leaves_no_rounding_behind() -> None:
    q, k, v = make(dtype=torch.float64)
    attention = DynamicAttention(q, k, v)
    attention.update_value(1, torch.full((3,), 1e14, dtype=torch.float64))
    attention.output()
    attention.update_value(1, v[1])
    assert_exact(attention, q, None, 1e-12)


def test_ids_are_stable_and_never_reused() -> None:
    q, k, v = make(dtype=torch.float64)
    attention = DynamicAttention(q, k, v)
    attention.delete(2)
    first = attention.append(k[0], v[0])
    attention.delete(first)
    assert attention.append(k[1], v[1]) == first + 1
    assert attention.ids == [0, 1, 3, 4, 5, 6, first + 1]
    torch.testing.assert_close(attention.keys[-1], k[1])
    with pytest.raises(ADMSValueError, match=f"got {first}; 7 entries"):
        attention.update_key(first, k[0])


@pytest.mark.parametrize("lead", LEADS)
def test_several_entries_at_once(lead: tuple[int, ...]) -> None:
    q, k, v = make(lead, dtype=torch.float64)
    _, keys, values = make(lead, entries=3, dtype=torch.float64, seed=1)
    attention = DynamicAttention(q, k, v)
    attention.update_key([4, 0, 2], keys)
    attention.update_value((1, 2, 3), values)
    assert attention.num_pending == 5
    k[..., [4, 0, 2], :] = keys
    v[..., [1, 2, 3], :] = values
    torch.testing.assert_close(attention.output(), dense(q, k, v), rtol=0, atol=1e-12)


def test_updates_and_reads_of_rows_touch_only_what_they_must() -> None:
    """An update computes nothing of length Q or N; a read of some rows nothing of length Q."""
    q, k, v = make(rows=401, entries=409, dtype=torch.float64)
    attention = DynamicAttention(q, k, v, lazy_threshold=4)
    with _LargestTensor() as update:
        attention.update_key(7, k[3].clone())
        attention.update_value(7, v[3].clone())
    assert update.numel <= 4, update.numel
    with _LargestTensor() as read:
        attention.output(rows=[5, 9])
    assert read.numel <= 3 * 5 * 2, read.numel
    assert attention.num_pending == 1


def test_memory_is_quadratic_with_scores_and_linear_in_chunks() -> None:
    q, k, v = make(rows=512, entries=512, dtype=torch.float64)
    kept = DynamicAttention(q, k, v)
    assert kept.nbytes <= 8 * (512 * 512 + 512 * 32)
    with _LargestTensor() as used:
        chunked = DynamicAttention(q, k, v, chunk_size=8)
        for step in range(20):
            chunked.update_key(step, k[step + 1])
            chunked.output()
        for step in range(12):
            chunked.delete(step)
        chunked.output()
    assert chunked.nbytes <= 8 * 512 * 32
    assert used.numel <= 512 * 8 + 8, used.numel


def test_chunks_of_deleted_entries_only() -> None:
    q, k, v = make(dtype=torch.float64)
    attention = DynamicAttention(q, k, v, lazy_threshold=0, chunk_size=2)
    for index in (0, 1, 4, 5):
        attention.delete(index)
    assert_exact(attention, q, None, 1e-12)


def test_slots_are_reused() -> None:
    q, k, v = make(entries=8, dtype=torch.float64)
    attention = DynamicAttention(q, k, v)
    for step in range(100):
        attention.delete(attention.ids[0])
        attention.append(k[step % 8], v[step % 8])
    attention.output()
    assert attention.nbytes == DynamicAttention(q, k, v).nbytes


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_gradients_equal_dense_through_updates(
    lead: tuple[int, ...], chunk_size: int | None
) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in make(lead, dtype=torch.float64))
    key = torch.randn(*lead, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    key.requires_grad_()
    value = key[..., :3].detach().clone().requires_grad_()
    inputs = (q, k, v, key, value)
    attention = DynamicAttention(q, k, v, chunk_size=chunk_size)
    first = attention.output()
    attention.update_key(1, key)
    added = attention.append(key * 2, value)
    attention.delete(0)
    second = attention.output(rows=[0, 4])
    weight = torch.arange(1.0, 4.0, dtype=torch.float64)
    got = torch.autograd.grad(((first**2) @ weight).sum() + (second @ weight).sum(), inputs)
    assert added == 7
    keys = torch.cat([key.unsqueeze(-2), k[..., 2:, :], 2 * key.unsqueeze(-2)], -2)
    values = torch.cat([v[..., 1:, :], value.unsqueeze(-2)], -2)
    loss = ((dense(q, k, v) ** 2) @ weight).sum()
    loss = loss + (dense(q[..., [0, 4], :], keys, values) @ weight).sum()
    for ours, theirs in zip(got, torch.autograd.grad(loss, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_an_update_without_grad_cuts_the_old_gradient() -> None:
    q, k, v = make(dtype=torch.float64)
    k.requires_grad_()
    attention = DynamicAttention(q, k, v)
    with torch.no_grad():
        attention.update_key(3, k[0])
    (grad,) = torch.autograd.grad(attention.output().square().sum(), k)
    assert torch.equal(grad[3], torch.zeros(4, dtype=torch.float64))
    assert grad[0].abs().sum() > 0


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    operations=st.lists(OPERATION, max_size=12),
    lead=st.sampled_from(LEADS),
    chunk_size=st.sampled_from([None, 3]),
)
def test_stale_reads_keep_within_their_bound(
    operations: list[tuple[str, int, float]], lead: tuple[int, ...], chunk_size: int | None
) -> None:
    q, k, v = make(lead, dtype=torch.float64)
    attention = DynamicAttention(q, k, v, lazy_threshold=5, exact=False, chunk_size=chunk_size)
    for name, number, size in operations:
        apply(attention, name, number, size, lead)
        bound = attention.error_bound()
        error = (attention.output() - dense(q, attention.keys, attention.values)).norm(dim=-1)
        assert (error <= bound + 1e-9 * (1 + attention.values.abs().max())).all()
        assert attention.num_pending <= 5


def test_stale_reads_are_stale_then_fresh_and_their_bound_is_useful() -> None:
    q, k, v = make(dtype=torch.float64)
    attention = DynamicAttention(q, k, v, lazy_threshold=2, exact=False)
    before = attention.output()
    for index in (0, 1):
        attention.update_key(index, k[index] + 1e-3)
        assert torch.equal(attention.output(), before)
    error = (before - dense(q, attention.keys, v)).norm(dim=-1)
    bound = attention.error_bound()
    assert (error > 0).all() and (bound < 0.01).all() and (bound >= error).all()
    attention.update_key(2, k[2] + 1e-3)
    assert torch.equal(attention.error_bound(), torch.zeros(5, dtype=torch.float64))
    assert_exact(attention, q, None, 1e-12)
    attention.update_key(2, k[2])
    attention.flush()
    assert_exact(attention, q, None, 1e-12)


def test_the_bound_is_attained_up_to_a_quarter() -> None:
    """One of two entries' scores moves: the bound is of the error's size."""
    q = torch.ones(1, 1, dtype=torch.float64)
    k = torch.tensor([[0.0], [0.0]], dtype=torch.float64)
    v = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    attention = DynamicAttention(q, k, v, exact=False, scale=1.0)
    attention.update_key(0, torch.tensor([0.5], dtype=torch.float64))
    error = (attention.output() - dense(q, attention.keys, v, 1.0)).abs().item()
    assert error == pytest.approx(math.tanh(0.25))
    assert 0.25 * attention.error_bound().item() <= error <= attention.error_bound().item()


@pytest.mark.measured
@pytest.mark.slow
def test_a_single_update_is_twenty_times_cheaper_than_recomputing() -> None:
    """Best of several, float32 inputs, n = 4096, d = 64, against float32 SDPA."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4096, 64, generator=generator) for _ in range(3))
    attention = DynamicAttention(q, k, v)

    def update(step: int) -> None:
        attention.update_key(step, k[step + 1])
        attention.output()

    def recompute(step: int) -> None:
        k[step] = k[step + 1]
        torch.nn.functional.scaled_dot_product_attention(
            q[None, None], k[None, None], v[None, None]
        )

    assert 20 * _best_seconds(update, 20) <= _best_seconds(recompute, 3)


def test_bad_arguments_say_what_was_expected() -> None:
    q, k, v = make((2,), dtype=torch.float64)
    attention = DynamicAttention(q, k, v)
    with pytest.raises(ADMSValueError, match=r"k must be \[2, 'N >= 1', 4\].* got \[2, 7, 3\]"):
        DynamicAttention(q, k[..., :3], v)
    with pytest.raises(ADMSValueError, match=r"v must be \[2, 7, 'E'\], got \[2, 6, 3\]"):
        DynamicAttention(q, k, v[:, 1:])
    with pytest.raises(ADMSValueError, match="dtype and device of q"):
        DynamicAttention(q, k.float(), v)
    with pytest.raises(ADMSTypeError, match="v must be a floating-point tensor, got torch.int64"):
        DynamicAttention(q, k, v.long())
    with pytest.raises(ADMSValueError, match="lazy_threshold must be at least 0, got -1"):
        DynamicAttention(q, k, v, -1)
    with pytest.raises(ADMSTypeError, match="chunk_size must be an int, got float"):
        DynamicAttention(q, k, v, chunk_size=2.0)  # type: ignore[arg-type]
    with pytest.raises(ADMSValueError, match="accumulator_dtype"):
        DynamicAttention(q, k, v, accumulator_dtype=torch.float16)
    with pytest.raises(ADMSValueError, match=r"k must be \[2, 4\], got \[4\]"):
        attention.update_key(0, k[0, 0])
    with pytest.raises(ADMSValueError, match=r"v must be \[2, 2, 3\], got \[2, 3\]"):
        attention.update_value([0, 1], v[:, 0])
    with pytest.raises(ADMSValueError, match="name each entry once"):
        attention.update_value([1, 1], v[:, :2])
    with pytest.raises(ADMSValueError, match="k must be finite"):
        attention.append(k[:, 0] * math.inf, v[:, 0])
    with pytest.raises(ADMSTypeError, match="i must be an int or a sequence of ints, got str"):
        attention.update_key("0", k[:, :1])  # type: ignore[arg-type]
    with pytest.raises(ADMSTypeError, match="i must be an int, got list"):
        attention.delete([0])  # type: ignore[arg-type]
    with pytest.raises(ADMSValueError, match=r"rows must be within 0 to 4, got \[5\]"):
        attention.output(rows=[5])
    with pytest.raises(ADMSValueError, match="exact=False reads cannot be differentiated"):
        DynamicAttention(q.requires_grad_(), k, v, exact=False)
    for index in range(6):
        attention.delete(index)
    with pytest.raises(ADMSValueError, match="entry 6 is the last one"):
        attention.delete(6)
    assert attention.num_entries == 1


class _LargestTensor(TorchDispatchMode):
    """Notes the most elements any operation put out."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        returns_alias = any(item.alias_info is not None for item in func._schema.returns)
        # Views and in-place writes allocate nothing.
        if isinstance(result, Tensor) and not returns_alias:
            self.numel = max(self.numel, result.numel())
        return result


def _best_seconds(step, count: int) -> float:  # type: ignore[no-untyped-def]
    times = []
    for index in range(count):
        start = time.perf_counter()
        step(index)
        times.append(time.perf_counter() - start)
    return min(times)
