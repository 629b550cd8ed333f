"""The kernel that puts a new token into its ring slot, on a GPU or in the interpreter."""

import pytest
import torch

from tests.kernels.material import DEVICE, RUNS_TRITON, draw, moved

pytestmark = pytest.mark.skipif(not RUNS_TRITON, reason="needs a GPU or TRITON_INTERPRET=1")


@pytest.mark.parametrize("bad", [None, float("nan"), float("-inf")])
def test_writes_one_slot_and_flags_what_is_not_finite(bad: float | None) -> None:
    from adms.kernels.decode_attention_triton import fused_write_token

    rows, heads, slots, size = 2, 3, 5, 16
    # As attention modules hand them over: a view with heads behind tokens.
    key, value = (draw(rows, 1, heads, size, seed=seed).transpose(1, 2) for seed in (0, 1))
    if bad is not None:
        value[1, 2, 0, 7] = bad
    keys, values = torch.zeros(rows, heads, slots, size), torch.zeros(rows, heads, slots, size)
    flag = torch.zeros(1, dtype=torch.uint8)
    given = (key, value, keys, values, torch.tensor([1, 4]), flag)
    key, value, keys, values, slots, flag = moved(given, DEVICE)
    fused_write_token(key, value, keys, values, slots, flag)
    assert bool(flag) == (bad is not None)
    for row, slot in enumerate((1, 4)):
        torch.testing.assert_close(keys[row, :, slot], key[row, :, 0])
        torch.testing.assert_close(values[row, :, slot], value[row, :, 0], equal_nan=True)
        keys[row, :, slot] = values[row, :, slot] = 0
    assert not keys.any() and not values.any()
