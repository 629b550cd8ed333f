"""Where codes, landmarks and recent tokens stand, row by row."""

import dataclasses

import pytest
import torch

from adms.config import ANCHOR_MODES, Sizes
from adms.places import MiddleGeometry, Places

SIZES = Sizes(sink=4, recent=16, budget=32, interval=1, chunk=8, max_positions=None)
# A token an entry, and entries for four tokens.
GEOMETRIES = [
    MiddleGeometry(
        raw_tokens=8,
        capacity=64,
        whole_records=8,
        block_tokens=8,
        entries_per_record=entries,
        landmarks=6,
    )
    for entries in (8, 2)
]
# Before anything is coded, coded and all there, after the first are dropped, and far on; whole
# blocks are coded.
EVICTED = torch.tensor([3, 10, 60, 76, 84, 500, 4 + 10**6])


def places_of(geometry: MiddleGeometry, room: int | None, mode: str) -> Places:
    most = None if room is None else room + SIZES.sink + SIZES.ring + SIZES.chunk
    sizes = dataclasses.replace(SIZES, max_positions=most)
    return Places(sizes, geometry, EVICTED, text_positions=False, anchor_mode=mode)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=["one each", "four each"])
@pytest.mark.parametrize("mode", ANCHOR_MODES)
@pytest.mark.parametrize("room", [None, 20], ids=["room for all", "squeezed"])
def test_landmarks_without_a_code_stand_before_all_codes_or_behind_them(
    geometry: MiddleGeometry, mode: str, room: int | None
) -> None:
    places = places_of(geometry, room, mode)
    middle, start = places.middle(geometry.num_entries(2**62)), places.recent_start
    # Three that a row has no code of, where it has lost so many, and one that it has a code of.
    old = places.first - torch.tensor([[9, 5, 1]])
    marks = torch.cat([torch.where(old >= SIZES.sink, old, -1), places.first + 2], dim=1)
    stand = places.landmarks(marks)
    with_old = 0
    for row in range(len(EVICTED)):
        valid = middle.valid[row]
        codes = middle.positions[row][valid][middle.order[row][valid].argsort()]
        if not len(codes):
            continue
        assert (codes.diff() > 0).all()
        assert SIZES.sink - 1 < codes[0] and codes[-1] < start[row]
        # Landmarks of "one each" stand where the code of their token does.
        if geometry.entries_per_record == geometry.block_tokens and len(codes) > 2:
            assert torch.isclose(stand[row, 3], codes[2], rtol=0, atol=1e-4)
        alone = stand[row, :3][marks[row, :3] >= 0]
        if not len(alone):
            continue
        with_old += 1
        # In proportion to a text of a million tokens, neighbours are as good as one position; they
        # may be equal in float32, but never change their order.
        assert (alone.diff() >= 0).all()
        assert (alone.diff() > 0).all() or (mode != "grid" and EVICTED[row] > 10**6)
        if mode == "near":
            assert codes[-1] < alone[0] and alone[-1] < start[row]
        else:
            assert SIZES.sink - 1 < alone[0] and alone[-1] < codes[0]
    assert with_old == 4


@pytest.mark.parametrize("mode", ["mean", "near"])
def test_the_middle_takes_the_positions_it_wants_or_all_there_are(mode: str) -> None:
    wanted = [0, 6, 56, 70, 70, 70, 70]  # 64 codes, and 6 landmarks once something was dropped
    for room in (None, 20):
        taken = places_of(GEOMETRIES[0], room, mode).recent_start[:, 0]
        shown = wanted if room is None else [min(room, one) for one in wanted]
        assert (taken - EVICTED.clamp(max=SIZES.sink)).tolist() == shown
