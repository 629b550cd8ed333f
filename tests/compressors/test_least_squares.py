"""Non-negative and regularised least squares against float64 oracles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls as scipy_nnls

from adms.compressors.least_squares import least_squares, nnls

RIDGE = 0.03


def problem(seed: int, equations: int, unknowns: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    system = torch.rand(equations, unknowns, generator=generator, dtype=torch.float64)
    target = torch.rand(equations, generator=generator, dtype=torch.float64)
    prior = torch.rand(unknowns, generator=generator, dtype=torch.float64) * 2
    return system, target, prior


def ridge_of(system: torch.Tensor) -> float:
    return RIDGE * float(system.square().sum(0).mean())


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), equations=st.integers(1, 40), unknowns=st.integers(1, 20))
def test_nnls_meets_the_kkt_conditions(seed: int, equations: int, unknowns: int) -> None:
    system, target, prior = problem(seed, equations, unknowns)
    solution = nnls(system, target, prior, RIDGE)
    gradient = system.T @ (system @ solution - target) + ridge_of(system) * (solution - prior)
    scale = float((system.T @ system).diagonal().max()) * 1e-7
    assert (solution >= 0).all()
    # Where an unknown is at its bound the objective must not fall inwards, elsewhere not at all.
    assert (gradient >= -scale).all()
    assert (gradient[solution > 0].abs() <= scale).all()


@pytest.mark.parametrize("seed", range(8))
def test_nnls_agrees_with_scipy(seed: int) -> None:
    system, target, prior = problem(seed, 30, 12)
    root = ridge_of(system) ** 0.5
    augmented = torch.cat([system, root * torch.eye(12, dtype=torch.float64)])
    expected, _ = scipy_nnls(augmented.numpy(), torch.cat([target, root * prior]).numpy())
    actual = nnls(system, target, prior, RIDGE)
    torch.testing.assert_close(actual, torch.from_numpy(expected), atol=1e-8, rtol=1e-8)
    assert (actual == 0).any() and (actual > 0).any()


def test_nnls_of_a_batch_is_each_alone_and_float32_is_near() -> None:
    problems = [problem(seed, 20, 9) for seed in range(5)]
    batch = nnls(*(torch.stack(parts) for parts in zip(*problems, strict=True)), RIDGE)
    for index, (system, target, prior) in enumerate(problems):
        alone = nnls(system, target, prior, RIDGE)
        torch.testing.assert_close(batch[index], alone)
        single = nnls(system.float(), target.float(), prior.float(), RIDGE)
        torch.testing.assert_close(single.double(), alone, atol=1e-4, rtol=1e-4)


def test_nnls_without_equations_is_the_prior() -> None:
    prior = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)
    actual = nnls(torch.zeros(4, 3, dtype=torch.float64), torch.ones(4).double(), prior, RIDGE)
    torch.testing.assert_close(actual, prior)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), equations=st.integers(1, 30), unknowns=st.integers(1, 12))
def test_least_squares_agrees_with_lstsq(seed: int, equations: int, unknowns: int) -> None:
    system, _, _ = problem(seed, equations, unknowns)
    generator = torch.Generator().manual_seed(seed + 1)
    target = torch.randn(equations, 5, generator=generator, dtype=torch.float64)
    prior = torch.randn(unknowns, 5, generator=generator, dtype=torch.float64)
    root = max(ridge_of(system), 1e-6) ** 0.5
    augmented = torch.cat([system, root * torch.eye(unknowns, dtype=torch.float64)])
    expected = torch.linalg.lstsq(augmented, torch.cat([target, root * prior])).solution
    actual = least_squares(system, target, prior, RIDGE)
    torch.testing.assert_close(actual, expected, atol=1e-7, rtol=1e-7)
