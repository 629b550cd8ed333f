"""Small regularised least-squares problems, many at once.

Shapes: ``...`` problems, ``Q`` equations, ``M`` unknowns, ``E`` right-hand sides.
"""

import torch

# Added to a Gram matrix's diagonal, relative to its mean: problems of any rank have one solution.
FLOOR = 1e-6
# Exchanges of whole sets of unknowns, then sweeps over single ones for what cycles.
EXCHANGES = 8
SWEEPS = 4


def nnls(
    system: torch.Tensor, target: torch.Tensor, prior: torch.Tensor, ridge: float
) -> torch.Tensor:
    """``argmin |A w - b|^2 + lambda |w - prior|^2`` over ``w >= 0``.

    Args:
        system: ``[..., Q, M]`` (``A``).
        target: ``[..., Q]`` (``b``).
        prior: ``[..., M]`` non-negative.
        ridge: ``lambda`` relative to the mean diagonal of ``A^T A``.

    Returns:
        ``[..., M]``.

    Source: Kim & Park (2008), block principal pivoting; differs in that a few sweeps of
    coordinate descent, which cannot raise the objective, follow instead of a backup rule.
    """
    gram, weight = _gram(system, ridge)
    right = (system.transpose(-1, -2) @ target[..., None])[..., 0] + weight * prior
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    free = torch.ones_like(right)
    for _ in range(EXCHANGES):
        # Fixed unknowns get an equation of their own that says zero.
        masked = gram * free[..., None] * free[..., None, :] + torch.diag_embed(1 - free)
        solution = torch.linalg.solve(masked, (right * free)[..., None])[..., 0]
        gradient = (gram @ solution[..., None])[..., 0] - right
        free = torch.where(free > 0, solution > 0, gradient < 0).to(free.dtype)
    solution = solution.clamp(min=0)
    gradient = (gram @ solution[..., None])[..., 0] - right
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    for _ in range(SWEEPS):
        for unknown in range(solution.shape[-1]):
            old = solution[..., unknown]
            new = (old - gradient[..., unknown] / diagonal[..., unknown]).clamp(min=0)
            gradient = gradient + (new - old)[..., None] * gram[..., unknown]
            solution = solution + (new - old)[..., None] * eye[unknown]
    return solution


def least_squares(
    system: torch.Tensor, target: torch.Tensor, prior: torch.Tensor, ridge: float
) -> torch.Tensor:
    """``argmin |Z C - Y|^2 + lambda |C - prior|^2``.

    Args:
        system: ``[..., Q, M]`` (``Z``).
        target: ``[..., Q, E]`` (``Y``).
        prior: ``[..., M, E]``.
        ridge: ``lambda`` relative to the mean diagonal of ``Z^T Z``.

    Returns:
        ``[..., M, E]``.
    """
    gram, _ = _gram(system, ridge)
    right = system.transpose(-1, -2) @ (target - system @ prior)
    return prior + torch.linalg.solve(gram, right)


def _gram(system: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``A^T A + lambda I`` and ``lambda [..., 1]``."""
    gram = system.transpose(-1, -2) @ system
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    weight = (ridge * mean).clamp(min=FLOOR)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return gram + weight * eye, weight[..., 0]
