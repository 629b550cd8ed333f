"""Any order of operations on a cache, against lists of tokens and dense attention in float64."""

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import adms
import adms.commit
from adms.compressors.base import COMPRESSORS
from tests.tier_oracle import VOCAB, ByteCompressor, Oracle, Row, Rules, one_layer_model

MAX_POSITIONS = 40
MODEL = one_layer_model(MAX_POSITIONS)
MOST_ROWS = 4
# What is compared has been through float64 twice, in different orders.
TOLERANCE = {"atol": 1e-9, "rtol": 1e-9}
for block in (1, 4):
    if f"test_byte_{block}" not in COMPRESSORS:
        adms.register_compressor(f"test_byte_{block}", ByteCompressor(block))

tokens = st.integers(0, VOCAB - 1)


class StreamMachine(RuleBasedStateMachine):
    """One cache and, in lists of tokens, what it must hold."""

    sink, recent, budget, interval, chunk, block = 2, 6, 16, 4, 8, 1

    # Over all runs of a class.
    operations = 0

    def __init__(self) -> None:
        super().__init__()
        # The invariant is checked once before the first operation.
        type(self).operations -= 1
        self.rules = Rules(
            self.sink,
            self.recent,
            self.budget,
            self.interval,
            self.chunk,
            MAX_POSITIONS,
            self.block,
            elements=2 * (4 + 4),
        )
        self.oracle = Oracle(MODEL, self.rules)
        self.model = MODEL
        self.cache = adms.enable_adms_llm(
            self.model,
            start_size=self.sink,
            recent_size=self.recent,
            compressed_budget=self.budget,
            compression_interval=self.interval,
            prefill_chunk_size=self.chunk,
            importance_ratio=0.0,
            compressor_type=f"test_byte_{self.block}" if self.budget else "low_rank",
        )
        self.rows: list[Row] = []
        self.length = 0

    def here(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids where the model is."""
        return ids.to(self.model.device)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """What the model gives for further ids, on the CPU."""
        given = None if mask is None else self.here(mask)
        output = self.model(self.here(ids), attention_mask=given, past_key_values=self.cache)
        return output.logits.cpu()

    # --- operations ---------------------------------------------------------------------------

    @rule(data=st.data(), columns=st.integers(1, 20), batch=st.integers(1, 3), full=st.booleans())
    def append(self, data: st.DataObject, columns: int, batch: int, full: bool) -> None:
        if not self.rows:
            self.rows = [Row() for _ in range(batch)]
        count = len(self.rows)
        padding = data.draw(st.lists(st.integers(0, columns), min_size=count, max_size=count))
        if columns == 1 or full:
            padding = [0] * count
        seed = data.draw(st.integers(0, 2**20))
        ids = torch.randint(VOCAB, (count, columns), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones(count, columns, dtype=torch.long)
        for row, pad in enumerate(padding):
            mask[row, :pad] = 0
        given = mask if any(padding) else None
        if given is not None and full:
            given = torch.cat([torch.ones(count, self.length, dtype=torch.long), mask], dim=1)
        logits = self.logits(ids, given)
        for index, row in enumerate(self.rows):
            real: list[int | None] = [
                token if keep else None
                for token, keep in zip(ids[index].tolist(), mask[index].tolist(), strict=True)
            ]
            expected = self.oracle.stream(row, real)
            torch.testing.assert_close(logits[index, padding[index] :], expected, **TOLERANCE)
        self.length += columns

    @rule(data=st.data(), steps=st.integers(1, 6))
    def steps(self, data: st.DataObject, steps: int) -> None:
        """Single tokens, the most frequent use of all."""
        if not self.rows:
            self.rows = [Row()]
        for _ in range(steps):
            count = len(self.rows)
            self.append_ids(data.draw(st.lists(tokens, min_size=count, max_size=count)))

    def append_ids(self, ids: list[int]) -> None:
        logits = self.logits(torch.tensor(ids)[:, None])[:, 0]
        for index, row in enumerate(self.rows):
            expected = self.oracle.stream(row, [ids[index]])
            torch.testing.assert_close(logits[index], expected[0], **TOLERANCE)
        self.length += 1

    @rule(first=tokens, columns=st.integers(1, 4), new=st.integers(1, 3))
    def generate(self, first: int, columns: int, new: int) -> None:
        """Greedy search, and its last token is in memory too."""
        if not self.rows:
            self.rows = [Row()]
        ids = (torch.arange(columns) + first) % VOCAB
        ids = ids.expand(len(self.rows), -1)
        produced = adms.generate_turn(
            self.model, self.cache, self.here(ids), max_new_tokens=new, do_sample=False
        ).tolist()
        for index, row in enumerate(self.rows):
            # generate_turn streams all but the last id together, then one at a time.
            for part in (ids[index, :-1].tolist(), ids[index, -1:].tolist()):
                if part:
                    logits = self.oracle.stream(row, part)
            wanted = []
            for _ in range(new):
                wanted.append(int(logits[-1].argmax()))
                logits = self.oracle.stream(row, [wanted[-1]])
            assert produced[index] == [*ids[index].tolist(), *wanted]
        self.length += columns + new

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        if self.rows:
            count = len(self.rows)
            order = data.draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count))
            self.cache.reorder_cache(torch.tensor(order))
            self.rows = [self.rows[index].copy() for index in order]

    @rule(repeats=st.integers(1, 2))
    def repeat(self, repeats: int) -> None:
        if len(self.rows) * repeats <= MOST_ROWS:
            self.cache.batch_repeat_interleave(repeats)
            self.rows = [row.copy() for row in self.rows for _ in range(repeats)]

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        if self.rows:
            keep = data.draw(
                st.lists(st.sampled_from(range(len(self.rows))), min_size=1, max_size=MOST_ROWS)
            )
            self.cache.batch_select_indices(torch.tensor(keep))
            self.rows = [self.rows[index].copy() for index in keep]

    @rule(really=st.integers(0, 4))
    def reset(self, really: int) -> None:
        # Seldom, or no stream would grow old.
        if really == 0:
            self.cache.reset()
            self.rows, self.length = [], 0

    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "stream.adms"
            self.cache.save(path)
            self.cache = adms.ADMSKVCache.load(path, model=self.model)

    @rule()
    def go_on_with_a_copy(self) -> None:
        twin = copy.deepcopy(self.cache)
        if self.rows:
            # What happens to the old one is nothing to the new one.
            self.logits(torch.zeros(len(self.rows), 7, dtype=torch.long))
        self.cache = twin

    @rule()
    def move(self) -> None:
        """To the CPU and back, as accelerate and transformers ask a cache to."""
        for layer in self.cache.layers:
            layer.offload()
            layer.prefetch()

    @rule(columns=st.integers(1, 12), where=st.sampled_from(["attention", "commit"]))
    def fail(self, columns: int, where: str) -> None:
        """A pass that fails leaves nothing behind."""
        if not self.rows:
            return
        columns = min(columns, self.chunk)
        ids = torch.ones(len(self.rows), columns, dtype=torch.long)

        def refuse(*_: object) -> None:
            raise RuntimeError("on purpose")

        if where == "attention":
            handle = self.model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(refuse)
            with pytest.raises(adms.ForwardError, match="on purpose"):
                self.logits(ids)
            handle.remove()
        else:
            # Once tokens have moved in the exact tiers.
            kept = adms.commit.write_moves
            adms.commit.write_moves = lambda *given: (kept(*given), refuse())
            try:
                self.logits(ids)
            except adms.ForwardError:
                pass
            else:
                # Nothing moved, so nothing could fail: the tokens are in.
                for row in self.rows:
                    self.oracle.stream(row, [1] * columns)
                self.length += columns
            finally:
                adms.commit.write_moves = kept

    # --- what always holds --------------------------------------------------------------------

    @invariant()
    def counts_and_bytes(self) -> None:
        type(self).operations += 1
        assert self.cache.get_seq_length() == self.length
        assert self.cache.tokens_seen == max((row.seen for row in self.rows), default=0)
        assert self.cache.nbytes <= self.cache.max_nbytes
        if self.rows:
            assert self.cache.batch_size == len(self.rows)
            held = [
                len(row.sinks) + len(row.recent) + len(self.rules.held(row.middle))
                for row in self.rows
            ]
            assert self.cache.num_entries(0) == max(held)


class BlockMachine(StreamMachine):
    """Tokens that enter the middle four at a time, and no room to compress positions into."""

    sink, recent, budget, interval, chunk, block = 3, 5, 17, 5, 6, 4


class WindowMachine(StreamMachine):
    """No middle at all: what leaves the window is forgotten, but for the sinks."""

    sink, recent, budget, interval, chunk = 2, 7, 0, 1, 8


class DeviceMachine(StreamMachine):
    """A stream that goes on with a model on another device."""

    models: dict[str, Any] = {}

    @rule()
    def change_device(self) -> None:
        if not self.models:
            self.models.update(cpu=MODEL, cuda=copy.deepcopy(MODEL).cuda())
        elsewhere = self.models["cuda" if self.model is MODEL else "cpu"]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "stream.adms"
            self.cache.save(path)
            self.cache = adms.ADMSKVCache.load(path, model=elsewhere)
        self.model = elsewhere


MACHINES = [StreamMachine, BlockMachine, WindowMachine]


def run(machine: type[StreamMachine], examples: int, steps: int) -> None:
    chosen = os.environ.get("ADMS_STATE_SEED")
    run_state_machine_as_test(
        machine if chosen is None else seed(int(chosen))(machine),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            # No shrinking: it replays long runs for many minutes, and a failure names its steps.
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("machine", MACHINES)
def test_operations_in_any_order(machine: type[StreamMachine]) -> None:
    run(machine, examples=8, steps=50)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_operations_on_two_devices() -> None:
    run(DeviceMachine, examples=4, steps=50)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("machine", MACHINES)
def test_many_operations_in_any_order(machine: type[StreamMachine]) -> None:
    """100,000 operations with all machines; ADMS_STATE_OPERATIONS asks for another number.

    Processes with ADMS_STATE_SEED of their own try different ones.
    """
    operations = int(os.environ.get("ADMS_STATE_OPERATIONS", "100000"))
    wanted, machine.operations = operations // len(MACHINES), 0
    # Runs end at 200 operations or, by chance, earlier.
    run(machine, examples=max(1, wanted // 140), steps=200)
    print(f"{machine.__name__}: {machine.operations:,} operations")
    assert machine.operations >= wanted
