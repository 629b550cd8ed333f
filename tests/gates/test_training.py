"""Training of gates on tiny models: the picture is what the cache does, and it learns."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from adms import enable_adms_llm, is_enabled
from adms.cli import app
from adms.errors import ADMSValueError, UnsupportedModelError
from adms.gates import AdaptiveUpdateConfig, UpdateGates
from adms.gates.fold import choose_hosts, fold, token_distance
from adms.gates.learned import log_importance
from adms.gates.shares import water_fill
from adms.gates.training import GateTraining, train_gates
from adms.gates.training_pass import FoldingSizes, fold_softly, visibility
from tests.compressors.material import tokens
from tests.patches import tiny as architectures

SMALL = GateTraining(
    sink=2, recent=16, length=64, block_tokens=8, rows=2, measured=2, steps=4, checkpoint_every=2
)
SIZES = FoldingSizes(sink=2, recent=16, block=8, admitted=5)


def test_a_token_reads_as_the_entry_that_the_coder_makes() -> None:
    entries = tokens(0, 2 + 5 * 8 + 3)
    weight = torch.randn(2 * 24, generator=torch.Generator().manual_seed(0)) * 0.2
    keys, values, places = fold_softly(entries.keys, entries.values, weight, SIZES)
    assert torch.equal(keys[:, :, :2], entries.keys[:, :, :2])
    assert torch.equal(values[:, :, 42:], entries.values[:, :, 42:])
    inside = [part[:, :, 2:42].unflatten(2, (-1, 8)) for part in (entries.keys, entries.values)]
    scores = log_importance(weight, *inside)
    hosts = choose_hosts(token_distance(*inside), 5, scores)
    folded = fold(*inside, hosts, 5)
    index = folded.members[:, None, :, :, None].expand(-1, 2, -1, -1, 16)
    torch.testing.assert_close(keys[:, :, 2:42], folded.keys.gather(3, index).flatten(2, 3))
    grid = 2 + torch.arange(5)[:, None] * 8 + (folded.members[0] + 0.5) * 8 / 5 - 0.5
    torch.testing.assert_close(places[0, 2:42], grid.flatten())


def test_every_query_sees_every_earlier_token_once() -> None:
    bias = visibility(60, SIZES, torch.zeros(1))[0, 0]
    exact, folded = (bias == 0).split(60, dim=1)
    assert not bool((exact & folded).any())
    assert torch.equal(exact | folded, torch.ones(60, 60, dtype=torch.bool).tril())
    last = folded[59].nonzero().flatten().tolist()
    assert last == list(range(2, 42)), "blocks that end at least 16 tokens before the query"


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox", "falcon-alibi", "mpt"])
def test_gradients_reach_the_gates_of_every_layer_with_a_middle(name: str) -> None:
    model = architectures.tiny(name)
    losses: list[float] = []
    measured: list[tuple[int, int]] = []
    gates = train_gates(
        model,
        architectures.ids(1, 200)[0],
        SMALL,
        on_step=lambda _, loss: losses.append(loss),
        on_measure=lambda *layers: measured.append(layers),
    )
    assert len(losses) == SMALL.steps
    assert all(0 < loss < math.inf for loss in losses)
    windows = {"gemma3": 1}.get(name, 0)
    own = gates.admissions[windows:]
    assert gates.admissions[:windows] == (1.0,) * windows
    assert sum(own) / len(own) <= SMALL.admission, "windows are no part of the mean"
    assert measured == [(done + 1, len(own)) for done in range(len(own))]
    for weight, share in zip(gates.weights, gates.admissions, strict=True):
        assert bool((weight != 0).any()) == (share < 1)
    assert not is_enabled(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    cache = enable_adms_llm(
        model,
        start_size=2,
        recent_size=16,
        compressed_budget=16,
        prefill_chunk_size=8,
        compressor_type="quantized",
        adaptive_update=AdaptiveUpdateConfig(policy="learned", gates=gates),
    )
    with torch.no_grad():
        ids = architectures.ids(1, 100, seed=1)
        assert model(ids, past_key_values=cache).logits.isfinite().all()


def test_shares_go_where_folding_costs_least() -> None:
    """Against every combination there is."""
    generator = torch.Generator().manual_seed(0)
    shares = (0.5, 0.25)
    for mean in (0.8, 0.6, 0.5, 0.4):
        # Losses that grow ever faster, as those of folding do: then greedy steps are the best.
        rises = torch.rand(4, 2, generator=generator) * torch.tensor([1.0, 0.5])
        rates = rises.cumsum(1) * torch.tensor([0.5, 0.25])
        losses = rates.cumsum(1).tolist()
        found = water_fill(losses, shares, mean)
        assert sum(found) / 4 <= mean
        costs = [dict(zip((1.0, *shares), (0.0, *own), strict=True)) for own in losses]
        total = sum(cost[share] for cost, share in zip(costs, found, strict=True))
        best = min(
            sum(cost[share] for cost, share in zip(costs, chosen, strict=True))
            for chosen in itertools.product((1.0, *shares), repeat=4)
            if sum(chosen) <= sum(found)
        )
        assert total == pytest.approx(best)
    with pytest.raises(ADMSValueError, match="below the least share"):
        water_fill([[0.1, 0.2]], shares, 0.2)


def test_a_layer_that_needs_all_its_tokens_keeps_them() -> None:
    assert water_fill([[5.0, 9.0], [0.1, 0.2], [0.1, 3.0]], (0.5, 0.25), 0.6) == (1.0, 0.25, 0.5)


def marked_loss(weight: torch.Tensor, seed: int, *, training: bool = False) -> torch.Tensor:
    """Error of attention by queries that look for a mark which a fifth of the tokens bear."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 8, 2, 2 + 6 * 8, 16, generator=generator)
    marked = torch.rand(8, 1, 2 + 6 * 8, generator=generator) < 0.2
    keys[..., 0] = torch.where(marked, 2.0, -0.5)
    query = torch.zeros(8, 2, 1, 16)
    query[..., 0], query[..., 1:] = 3.0, torch.randn(8, 2, 1, 15, generator=generator)

    def read(own_keys: torch.Tensor, own_values: torch.Tensor) -> torch.Tensor:
        return (query @ own_keys.transpose(2, 3) / 2).softmax(-1) @ own_values

    folded = fold_softly(keys, values, weight, SIZES, generator if training else None)[:2]
    return (read(*folded) - read(keys, values)).square().mean()


def test_a_gate_learns_which_tokens_matter() -> None:
    """The gradient lowers the error on tokens that it was not trained on."""
    weight = torch.zeros(2 * 2 * 16, requires_grad=True)
    optimiser = torch.optim.Adam([weight], lr=0.01)
    for step in range(40):
        optimiser.zero_grad()
        marked_loss(weight, step, training=True).backward()
        optimiser.step()
    with torch.no_grad():
        before = torch.stack([marked_loss(torch.zeros(64), 1000 + seed) for seed in range(8)])
        after = torch.stack([marked_loss(weight, 1000 + seed) for seed in range(8)])
    assert after.mean() < 0.3 * before.mean()
    assert float(weight.detach()[[0, 16]].min()) > 0, "the mark's channel of both heads"


def test_a_killed_training_goes_on_to_the_same_gates(tmp_path: Path) -> None:
    model, ids = architectures.tiny("llama"), architectures.ids(1, 200)[0]
    whole = train_gates(model, ids, SMALL)
    path = tmp_path / "checkpoint"

    def stop(step: int, _: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_gates(model, ids, SMALL, checkpoint=path, on_step=stop)
    steps: list[int] = []
    again = train_gates(
        model, ids, SMALL, checkpoint=path, on_step=lambda step, _: steps.append(step)
    )
    assert steps == [3, 4], "the checkpoint is of two steps"
    for mine, other in zip(again.weights, whole.weights, strict=True):
        torch.testing.assert_close(mine, other)
    with pytest.raises(ADMSValueError, match="other settings"):
        train_gates(model, ids, GateTraining(length=64, recent=16, block_tokens=8), checkpoint=path)
    with pytest.raises(ADMSValueError, match="another text"):
        train_gates(model, ids.flip(0), SMALL, checkpoint=path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ADMSValueError, match="cannot be read as a checkpoint; remove it"):
        train_gates(model, ids, SMALL, checkpoint=path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"admission": 1.0}, "nothing to learn"),
        ({"steps": -1}, "steps must be an integer of at least 0"),
        ({"length": 100}, "leaves no block to fold"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, float], message: str) -> None:
    with pytest.raises(ADMSValueError, match=message):
        GateTraining(**given)


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="positions do not enter at the embedding"):
        train_gates(architectures.tiny("opt"), architectures.ids(1, 200)[0], SMALL)
    with pytest.raises(ADMSValueError, match="give a longer text"):
        train_gates(architectures.tiny("llama"), architectures.ids(1, 40)[0], SMALL)


def test_the_command_trains_and_writes_a_small_file(
    tiny_model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "gates.safetensors"
    options = {"length": 64, "recent": 16, "block-tokens": 8, "steps": 2, "tokens": 500}
    words = ["train-gates", "--model", str(tiny_model_folder), "--text", str(text_file)]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    result = CliRunner().invoke(app, [*words, "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "written to" in result.output
    assert 0.125 <= UpdateGates.load(output).admission <= 0.6
    assert list(output.parent.iterdir()) == [output], "the checkpoint is gone"


@pytest.mark.parametrize("output", ["", "file/gates.safetensors"])
def test_an_output_that_cannot_be_is_refused_before_the_model_is_loaded(
    tmp_path: Path, output: str
) -> None:
    (tmp_path / "file").touch()
    words = ["train-gates", "--model", "./absent", "--output", str(tmp_path / output)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "is a folder" in result.stderr or "cannot write" in result.stderr
