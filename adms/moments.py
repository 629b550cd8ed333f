"""Fitting a calibration: what keys, values and queries of a model look like, on some texts.

Without texts the model writes its own: short pieces, each begun with a random token. Keys are
weighted before the fit by how strongly queries read each channel, with queries turned to random
positions, because what an error in a key costs is the error of its scores.

Shapes: ``B`` rows, ``H`` query heads, ``K`` KV heads, ``N`` tokens, ``D``/``E`` head size of
keys/values, ``S`` blocks of heads with a basis each, ``J`` channels of a block.
"""

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from adms import compat
from adms.binding import rotate_to
from adms.cache import ADMSKVCache
from adms.calibration import Calibration, read_calibration
from adms.config import ADMSConfig
from adms.entries import TokenShape
from adms.errors import ADMSTypeError
from adms.layer import ADMSLayer
from adms.ranks import Ranks

if TYPE_CHECKING:
    from adms.patches import Family

logger = logging.getLogger("adms")

# Added to a channel's query power, relative to the mean, so that no weight is zero.
QUERY_FLOOR = 0.01
# Of a channel's query power, so that its root is a float16 and no tiny one.
WEIGHT_RANGE = (1e-6, 1e8)
# The model's own texts: tokens of each, those at the start that are like sinks and not counted,
# and how many counted tokens there are for each channel of a basis.
OWN_TOKENS = 32
SKIPPED_TOKENS = 4
TOKENS_PER_CHANNEL = 4
LEAST_TEXTS, MOST_TEXTS = 8, 256
# Positions that queries are turned to.
FARTHEST = 4096
# Tokens of the window in which given texts are read, and of one pass.
READ_WINDOW, READ_CHUNK = 1024, 256


@dataclass
class Moments:
    """Sums over tokens of one layer, from which its bases are fitted.

    Attributes:
        shape: keys and values of one token.
        block_heads: KV heads that share a basis.
    """

    shape: TokenShape
    block_heads: int
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    count: int = 0
    queries: torch.Tensor | None = None
    num_queries: int = 0

    def add(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Counts tokens ``[B, K, N, D]`` and ``[B, K, N, E]``, before positions."""
        for name, states in (("key", keys), ("value", values)):
            flat = _by_block(states, self.block_heads)
            self._add(f"{name}_sum", flat.sum(1))
            self._add(f"{name}_product", flat.transpose(1, 2) @ flat)
        self.count += keys.shape[0] * keys.shape[2]

    def add_queries(self, queries: torch.Tensor) -> None:
        """Counts queries ``[B, H, N, D]`` as keys meet them: at other positions than their own."""
        power = queries.float().square().sum((0, 2))
        power = power.unflatten(0, (self.shape.num_heads, -1)).mean(1)
        self.queries = power if self.queries is None else self.queries + power
        self.num_queries += queries.shape[0] * queries.shape[2]

    def _add(self, name: str, part: torch.Tensor) -> None:
        self.sums[name] = self.sums[name] + part if name in self.sums else part

    def fit(self, blocks: int) -> dict[str, torch.Tensor]:
        """The tensors of a ``LayerCalibration``."""
        power = self.queries
        if power is None:
            power = self.sums["key_sum"].new_ones(self.shape.num_heads, self.shape.key_dim)
        power = power.reshape(blocks, -1) / max(1, self.num_queries)
        power = power + QUERY_FLOOR * power.mean(1, keepdim=True)
        weight = power.clamp(WEIGHT_RANGE[0], WEIGHT_RANGE[1])
        weight = weight.sqrt().half()
        key_basis, key_scale = self._basis("key", weight.float())
        value_basis, value_scale = self._basis("value", None)
        return {
            "key_basis": key_basis,
            "key_scale": key_scale,
            "key_weight": weight,
            "value_basis": value_basis,
            "value_scale": value_scale,
        }

    def _basis(self, name: str, weight: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.sums[f"{name}_sum"].double() / self.count
        product = self.sums[f"{name}_product"].double() / self.count
        covariance = product - mean[:, :, None] * mean[:, None, :]
        if weight is not None:
            covariance = covariance * weight[:, :, None] * weight[:, None, :]
        _, directions = torch.linalg.eigh(covariance)
        basis = directions.flip(2).transpose(1, 2).float()
        scale = (basis.abs().amax(2) / 127).clamp(min=1e-7).half()
        stored = (basis / scale.float()[..., None]).round().clamp(-127, 127)
        return stored.to(torch.int8).contiguous(), scale


def _by_block(states: torch.Tensor, block_heads: int) -> torch.Tensor:
    """``[B, K, N, D]`` -> ``[S, B * N, J]`` in float32."""
    rows, heads, count, size = states.shape
    grouped = states.float().view(rows, heads // block_heads, block_heads, count, size)
    return grouped.permute(1, 0, 3, 2, 4).reshape(heads // block_heads, rows * count, -1)


# --- observing a model -----------------------------------------------------------------------


class ObservingLayer(ADMSLayer):
    """A layer that also counts what passes through it."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``ADMSLayer.update``."""
        self.observer.moments_of(self.layer_idx, key_states, value_states)
        return super().update(key_states, value_states, *args, **kwargs)

    def keep_queries(self, queries: torch.Tensor) -> None:
        """Counts the pass's queries ``[B, H, Q, D]``."""
        self.observer.count_queries(self.layer_idx, queries)

    @property
    def observer(self) -> "ObservingCache":
        """The cache, which holds the sums."""
        if not isinstance(self.cache, ObservingCache):
            raise RuntimeError("an observing layer belongs to an observing cache")
        return self.cache


class ObservingCache(ADMSKVCache):
    """An exact window that sums up the keys, values and queries of all tokens but the first.

    Args:
        window: tokens of the window.
        chunk: most tokens of a pass.
        calibration: what is to be fitted.
        generator: draws the positions that queries are turned to.
    """

    layer_class = ObservingLayer

    def __init__(
        self, window: int, chunk: int, calibration: Calibration, generator: torch.Generator
    ) -> None:
        super().__init__(
            ADMSConfig(
                start_size=SKIPPED_TOKENS,
                recent_size=window,
                compressed_budget=0,
                enable_dynamic_sink=False,
                prefill_chunk_size=chunk,
            )
        )
        self.calibration = calibration
        self.generator = generator
        self.moments: dict[int, Moments] = {}

    def moments_of(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Counts one layer's new tokens."""
        first = max(0, SKIPPED_TOKENS - self.timeline_length)
        if first >= keys.shape[2] or layer_idx not in self.calibration.layers:
            return
        if layer_idx not in self.moments:
            shape = TokenShape(keys.shape[1], keys.shape[3], values.shape[3])
            blocks = self.calibration.layers[layer_idx].num_blocks(shape)
            self.moments[layer_idx] = Moments(shape, shape.num_heads // blocks)
        self.moments[layer_idx].add(keys[:, :, first:], values[:, :, first:])

    def count_queries(self, layer_idx: int, queries: torch.Tensor) -> None:
        """Counts one layer's new queries, each turned to a position of its own."""
        if layer_idx not in self.moments:
            return
        farthest = min(FARTHEST, self.sizes.max_positions or FARTHEST)
        rows, count = queries.shape[0], queries.shape[2]
        positions = torch.randint(farthest, (rows, count), generator=self.generator)
        scheme = self.binding_for_use.kinds[layer_idx].scheme
        turned = rotate_to(scheme, queries, positions.float().to(queries.device))
        self.moments[layer_idx].add_queries(turned)


def plan_calibration(model: nn.Module, family: "Family") -> Calibration:
    """Places for the bases of all of a model's layers that ADMS holds."""
    shapes = {
        index: kind.shape
        for index, kind in enumerate(family.kinds(family.decoder(model)))
        if kind.plain is None
    }
    ranks = Ranks.of(compat.tensor_parallel_group(model))
    return Calibration.planned(shapes, compat.weight_bytes(model), ranks)


def resolve_calibration(
    model: nn.Module, family: "Family", given: Calibration | str | os.PathLike[str] | None
) -> Calibration | None:
    """What ``enable_adms_llm`` was given, checked against the model.

    Raises:
        ADMSTypeError: neither a calibration nor a path.
        ADMSValueError: it cannot be read, is not fitted, or is of another model.
    """
    if given is None:
        return None
    if not isinstance(given, Calibration | str | os.PathLike):
        raise ADMSTypeError(
            "calibration must be what adms.calibrate returned or the path it wrote, got "
            f"{type(given).__name__}"
        )
    plan = plan_calibration(model, family)
    if isinstance(given, Calibration):
        # Checks its form; the object itself is kept, so that caches share its tensors.
        plan.load_state(given.state(), given.source)
        return given if given.ranks == plan.ranks else plan
    plan.load_state(*read_calibration(given))
    return plan


def fit_to_own_texts(model: nn.Module, calibration: Calibration, seed: int = 0) -> None:
    """Fits a calibration to texts that the model writes itself.

    Args:
        model: enabled; a model without a head reads random tokens instead.
        calibration: what is to be fitted.
        seed: of the first tokens and of the sampling.
    """
    channels = max(
        layer.block_channels(calibration.shapes[index])
        for index, layer in calibration.layers.items()
    )
    counted = OWN_TOKENS - SKIPPED_TOKENS
    texts = math.ceil(TOKENS_PER_CHANNEL * channels / counted)
    texts = min(max(texts, LEAST_TEXTS), MOST_TEXTS)
    logger.info(
        "fitting the code of the middle tier to the model, once, on %d short texts of its own; "
        "adms.calibrate(model, texts) fits it to yours",
        texts,
    )
    generator = torch.Generator().manual_seed(seed)
    cache = ObservingCache(OWN_TOKENS, 1, calibration, generator)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    writes = model.get_output_embeddings() is not None  # type: ignore[operator]
    vocabulary, device = embeddings.weight.shape[0], embeddings.weight.device
    if device.type == "meta":
        # Offloaded weights are brought in by hooks, which take inputs from anywhere.
        device = torch.device("cpu")
    with _evaluating(model):
        ids = torch.randint(vocabulary, (texts, 1), generator=generator)
        for _ in range(OWN_TOKENS):
            output = model(ids.to(device), past_key_values=cache)
            logits = getattr(output, "logits", None)
            if logits is None or not writes:
                ids = torch.randint(vocabulary, (texts, 1), generator=generator)
                continue
            weights = torch.softmax(logits[:, -1].float(), dim=-1).cpu()
            ids = torch.multinomial(weights, 1, generator=generator)
    calibration.fill(cache.moments, "the model's own texts")


def fit_to_texts(
    model: nn.Module,
    calibration: Calibration,
    texts: list[torch.Tensor],
    positions: int | None,
    seed: int = 0,
) -> None:
    """Fits a calibration to token ids, with a progress bar.

    Args:
        model: enabled.
        calibration: what is to be fitted.
        texts: one-dimensional token ids each.
        positions: that the model was trained on; None where any distance works.
        seed: of the positions that queries are turned to.
    """
    generator = torch.Generator().manual_seed(seed)
    limit = positions or 4 * READ_WINDOW
    window, chunk = min(READ_WINDOW, limit // 4), min(READ_CHUNK, limit // 4)
    cache = ObservingCache(window, chunk, calibration, generator)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    device = embeddings.weight.device
    total = sum(len(text) for text in texts)
    with _evaluating(model), tqdm(total=total, desc="calibrating", unit="token") as bar:
        for text in texts:
            cache.reset()
            for part in text.split(chunk):
                model(part[None].to(device), past_key_values=cache)
                bar.update(len(part))
    calibration.fill(cache.moments, f"{total} tokens of {len(texts)} texts")


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients, and everything as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
