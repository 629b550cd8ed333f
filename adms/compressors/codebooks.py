"""Universal codebooks: residual vector quantisation of eight Gaussian channels, a byte a stage.

They depend on no data and no model. They are trained once by ``scripts/make_codebooks.py`` and
shipped, because k-means does not give the same numbers on every machine and what was coded with one
codebook must be decoded with the same.
"""

from functools import lru_cache
from importlib.resources import as_file, files

import torch
from safetensors.torch import load_file

from adms.kernels.choice import is_fused

GROUP = 8
WORDS = 256
# First words that are tried, and stages over which they are judged.
STARTS = 4
JOINT_STAGES = 3
# Vectors whose nearest words are looked for at a time: what a processor's cache holds is searched
# several times faster than the whole at once, and a device should not fill its memory with scores.
SEARCHED_TOGETHER = 512
SEARCHED_ON_DEVICE = 2**17
# Makes the best score positive: no word's squared length is above twice this.
POSITIVE = 16.0


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


@lru_cache(maxsize=8)
def half_norms_on(device: torch.device) -> torch.Tensor:
    """Half the squared lengths of all codewords on a device, negative: ``[stages, 256]``."""
    return -0.5 * shipped()[0].square().sum(-1).to(device)


def nearest(
    vectors: torch.Tensor, codebook: torch.Tensor, half: torch.Tensor | None = None
) -> torch.Tensor:
    """Index of the nearest codeword: ``[..., 8]`` and ``[256, 8]`` -> ``[...]``.

    Args:
        vectors: what is looked for.
        codebook: the codewords.
        half: minus half of their squared lengths ``[256]``, if they are known.
    """
    return _search(vectors, codebook, 1, half)[..., 0]


def assign(vectors: torch.Tensor, kept: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """Codes of vectors, a word of each stage.

    Greedy but for the first word: of the ``STARTS`` nearest the one is taken from which the stages
    that are kept leave the least error. (A full beam search leaves 2% less of it after two stages,
    at several times the cost.)

    Args:
        vectors: ``[B, G, N, 8]``.
        kept: ``[B, G]`` stages by which the error is judged.
        most: ``[B, G]`` stages that are asked for, at least as many.

    Returns:
        ``[B, stages, G, N]`` uint8, zeros where a stage is not asked for.
    """
    if is_fused(vectors.device):
        from adms.kernels.codewords_triton import fused_assign

        return fused_assign(vectors, kept, most)
    return plain_assign(vectors, kept, most)


def plain_assign(vectors: torch.Tensor, kept: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """``assign`` in plain PyTorch, the twin of the fused form.

    On a device it searches the words of all stages, also where they are not asked for.
    """
    books, halves = codebooks_on(vectors.device), half_norms_on(vectors.device)
    rows, groups, count = vectors.shape[:3]
    residual = vectors.clone(memory_format=torch.contiguous_format).flatten(0, 1)
    kept, most = kept.flatten(), most.flatten()
    codes = torch.zeros(len(books), *residual.shape[:2], dtype=torch.uint8, device=residual.device)
    for stage, book in enumerate(books):
        some = _asked(most > stage)
        left = residual[some]
        first = stage == 0
        index = _first_words(left, kept[some]) if first else nearest(left, book, halves[stage])
        codes[stage, some] = index.to(torch.uint8)
        residual[some] = left - book[index]
    return codes.view(len(books), rows, groups, count).transpose(0, 1)


def _first_words(vectors: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """``[R, N, 8]`` and ``[R]`` stages that count -> ``[R, N]``."""
    books, halves = codebooks_on(vectors.device), half_norms_on(vectors.device)
    several = _asked(kept > 1)
    tried = vectors[several]
    starts = _search(tried, books[0], STARTS, halves[0])
    left = tried[:, :, None] - books[0][starts]
    best = starts[..., 0]
    for stage in range(1, JOINT_STAGES):
        left = left - books[stage][nearest(left, books[stage], halves[stage])]
        chosen = left.square().sum(-1).argmin(-1, keepdim=True)
        deeper = (kept[several] > stage)[:, None]
        best = torch.where(deeper, starts.gather(-1, chosen)[..., 0], best)
    if isinstance(several, slice):
        return best
    index = nearest(vectors, books[0], halves[0])
    index[several] = best
    return index


def _asked(mask: torch.Tensor) -> torch.Tensor | slice:
    """Which rows to work on: all where asking the device would cost more than the work."""
    return slice(None) if mask.is_cuda else mask.nonzero()[:, 0]


def _search(
    vectors: torch.Tensor, codebook: torch.Tensor, count: int, half: torch.Tensor | None = None
) -> torch.Tensor:
    """Indices of the nearest codewords, nearest first: ``[..., 8]`` -> ``[..., count]``."""
    if half is None:
        half = -0.5 * codebook.square().sum(-1)
    flat = vectors.reshape(-1, GROUP)
    if vectors.is_cuda:
        found = []
        for part in flat.split(SEARCHED_ON_DEVICE):
            scores = torch.addmm(half, part, codebook.T)
            one = count == 1
            found.append(scores.argmax(1, keepdim=True) if one else scores.topk(count).indices)
    else:
        parts = flat.split(SEARCHED_TOGETHER)
        found = [_packed_search(part, codebook, POSITIVE + half, count) for part in parts]
    return torch.cat(found).view(*vectors.shape[:-1], count)


def _packed_search(
    vectors: torch.Tensor, codebook: torch.Tensor, offset: torch.Tensor, count: int
) -> torch.Tensor:
    """``[N, count]``; the index rides in the last bits of a score, so that a maximum brings it.

    A maximum of integers is several times faster than one that keeps track of its place. Positive
    floats are ordered like the integers that their bits are; the lost bits are 2^-15 of a score.
    """
    scores = torch.addmm(offset, vectors, codebook.T).view(torch.int32)
    scores.bitwise_and_(-WORDS).bitwise_or_(torch.arange(WORDS, dtype=torch.int32))
    found = []
    for _ in range(count):
        most = scores.amax(1, keepdim=True)
        found.append(most.bitwise_and(WORDS - 1))
        if len(found) < count:
            scores.masked_fill_(scores == most, 0)
    return torch.cat(found, dim=1).long()


def train(
    stages: int, samples: int = 400_000, iterations: int = 40, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """K-means on unit Gaussian samples, then on what each stage leaves over.

    Later stages are fitted to what the best of several paths leaves over, as ``assign`` will
    choose it, and not to that of the nearest word alone.

    Returns:
        Codebooks ``[stages, 256, 8]`` and mean squared errors ``[stages + 1]`` per channel, the
        first being 1.

    Source: residual vector quantisation, Juang & Gray (1982); k-means, Lloyd (1957).
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(samples, GROUP, generator=generator)
    paths, errors = first[:, None], [1.0]
    books: list[torch.Tensor] = []
    for _ in range(stages):
        best = paths[:, 0]
        book = best[torch.randperm(samples, generator=generator)[:WORDS]].clone()
        for _ in range(iterations):
            left, index = _best_path(paths, book)
            count = torch.bincount(index, minlength=WORDS)
            total = torch.zeros_like(book).index_add_(0, index, left)
            fresh = best[torch.randint(samples, (WORDS,), generator=generator)]
            book = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], fresh)
        book = book.half().float()
        if books:
            paths = paths - book[nearest(paths, book)]
        else:
            paths = first[:, None] - book[_search(first, book, STARTS)]
        # The nearest first word is not the best any more; sorted so that the best path leads.
        order = paths.square().sum(-1).argsort(dim=1)
        paths = paths.gather(1, order[..., None].expand_as(paths))
        books.append(book)
        errors.append(float(paths[:, 0].square().mean()))
    return torch.stack(books), torch.tensor(errors)


def _best_path(paths: torch.Tensor, book: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is left before this stage on the path that is best after it, and its word there."""
    index = nearest(paths, book)
    chosen = (paths - book[index]).square().sum(-1).argmin(1, keepdim=True)
    left = paths.gather(1, chosen[..., None].expand(-1, -1, GROUP))[:, 0]
    return left, index.gather(1, chosen)[:, 0]
