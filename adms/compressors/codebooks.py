"""Universal codebooks: residual vector quantisation of eight Gaussian channels, a byte a stage.

They depend on no data and no model. They are trained once by ``scripts/make_codebooks.py`` and
shipped, because k-means does not give the same numbers on every machine and what was coded with one
codebook must be decoded with the same.
"""

from functools import lru_cache
from importlib.resources import as_file, files

import torch
from safetensors.torch import load_file

GROUP = 8
WORDS = 256
# Vectors whose nearest words are looked for at a time, where there is a cache to stay in.
SEARCHED_TOGETHER = 512


@lru_cache(maxsize=1)
def shipped() -> tuple[torch.Tensor, tuple[float, ...]]:
    """Codebooks ``[stages, 256, 8]`` (float32, CPU) and the error left after 0, 1, ... stages."""
    with as_file(files("adms.compressors") / "codebooks.safetensors") as path:
        stored = load_file(path)
    return stored["codebooks"].float(), tuple(stored["errors"].tolist())


@lru_cache(maxsize=8)
def codebooks_on(device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The codebooks on a device."""
    return shipped()[0].to(device, dtype)


def nearest(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the nearest codeword: ``[..., 8]`` and ``[256, 8]`` -> ``[...]``."""
    half = 0.5 * codebook.square().sum(-1)
    if vectors.is_cuda:
        return (vectors @ codebook.T - half).argmax(-1)
    # What a processor's cache holds is searched several times faster than the whole at once.
    found = [
        torch.addmm(-half, part, codebook.T).argmax(-1)
        for part in vectors.reshape(-1, GROUP).split(SEARCHED_TOGETHER)
    ]
    return torch.cat(found).view(vectors.shape[:-1])


def train(
    stages: int, samples: int = 100_000, iterations: int = 40, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """K-means on unit Gaussian samples, then on what each stage leaves over.

    Returns:
        Codebooks ``[stages, 256, 8]`` and mean squared errors ``[stages + 1]`` per channel, the
        first being 1.

    Source: residual vector quantisation, Juang & Gray (1982); k-means, Lloyd (1957).
    """
    generator = torch.Generator().manual_seed(seed)
    residual = torch.randn(samples, GROUP, generator=generator)
    books, errors = [], [1.0]
    for _ in range(stages):
        book = residual[torch.randperm(samples, generator=generator)[:WORDS]].clone()
        for _ in range(iterations):
            index = nearest(residual, book)
            count = torch.bincount(index, minlength=WORDS)
            total = torch.zeros_like(book).index_add_(0, index, residual)
            fresh = residual[torch.randint(samples, (WORDS,), generator=generator)]
            book = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], fresh)
        residual = residual - book[nearest(residual, book)]
        books.append(book)
        errors.append(float(residual.square().mean()))
    return torch.stack(books), torch.tensor(errors)
