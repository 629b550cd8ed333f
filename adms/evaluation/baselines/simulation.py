"""Runs a model with a baseline's memory: correct first, in plain PyTorch.

For the duration of a ``with`` block the model's attention modules hand over keys before positions,
and an attention function reads what the policy holds. Entries have positions inside the cache, as
ADMS has them, so every method streams past the trained length and is compared on equal terms.

Shapes: ``K`` KV heads, ``G`` query heads for each, ``Q`` new tokens, ``N`` entries.
"""

import contextlib
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adms import compat
from adms.cache import ADMSKVCache
from adms.errors import ADMSTypeError, ADMSValueError, CacheStateError, UnsupportedModelError
from adms.evaluation.baselines.policy import Held, Policy, Setting
from adms.patches import find_family

ATTENTION_NAME = "adms_simulated"


class SimulatedCache(Cache):
    """A baseline's memory over all layers.

    ``nbytes`` counts what an implementation would store, not the float tensors held here.

    Args:
        policies: one per layer.
        schemes: how positions enter, one per layer.
        chunk: most tokens of one pass.
        max_nbytes: what ``nbytes`` never exceeds.
        max_positions: positions the model was trained on; None where any distance works.
    """

    def __init__(
        self,
        policies: list[Policy],
        schemes: list[Any],
        chunk: int,
        max_nbytes: int,
        max_positions: int | None,
    ) -> None:
        super().__init__(layers=[])
        self.policies = policies
        self.schemes = schemes
        self.chunk = chunk
        self.max_nbytes = max_nbytes
        self.max_positions = max_positions
        self.held: list[Held | None] = [None] * len(policies)
        self.tokens_seen = 0
        self._staged: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(policies)
        self._shared: dict[Any, Any] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen."""
        return self.tokens_seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """The mask is built here; transformers need only build a small one."""
        return query_length, 0

    @property
    def nbytes(self) -> int:
        """Bytes in which an implementation would store what is held."""
        pairs = zip(self.policies, self.held, strict=True)
        return sum(policy.nbytes(held) for policy, held in pairs if held is not None)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps a pass's keys ``[1, K, Q, D]`` (before positions) and values for attention."""
        if key_states.shape[0] != 1:
            raise ADMSValueError(
                f"baseline methods read one row, got {key_states.shape[0]}; use a batch of 1"
            )
        if key_states.shape[2] > self.chunk:
            raise ADMSValueError(
                f"a pass has {key_states.shape[2]} tokens and these bytes allow {self.chunk}; "
                "use smaller chunks"
            )
        self._staged[layer_idx] = (key_states[0], value_states[0])
        return key_states, value_states

    def attend(self, layer_idx: int, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attention of ``query [1, H, Q, D]`` over the layer, which then forgets what it must.

        Returns:
            ``[1, Q, H, E]``.
        """
        staged = self._staged[layer_idx]
        if staged is None:
            raise CacheStateError(f"attention of layer {layer_idx} before its keys")
        keys, values = staged
        self._staged[layer_idx] = None
        new, heads = keys.shape[1], keys.shape[0]
        if layer_idx == 0:
            # Positions depend on the number of entries alone, which layers mostly share.
            self._shared = {}
            self.tokens_seen += new
        held = self._extended(self.held[layer_idx], keys, values)
        count = held.num_entries
        scheme = self.schemes[layer_idx]
        every, fresh = self._tables(scheme, count, new, query)
        rotated = scheme.rotate(held.keys[None].to(query.dtype), every)[0]
        queries = scheme.rotate(query, fresh)[0].unflatten(0, (heads, -1))
        scores = torch.einsum("kgqd,knd->kgqn", queries.float(), rotated.float()) * scaling
        if held.log_weight is not None:
            scores = scores + held.log_weight[:, None, None]
        future = torch.ones(new, count, dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(future.triu(count - new + 1), -torch.inf)
        weights = scores.softmax(-1)
        output = torch.einsum("kgqn,kne->qkge", weights, held.values.float()).flatten(1, 2)
        policy = self.policies[layer_idx]
        pooled = weights.mean(1) if policy.needs_weights else None
        self.held[layer_idx] = policy.reduce(held, pooled, new)
        return output[None].to(query.dtype)

    def _extended(self, held: Held | None, keys: torch.Tensor, values: torch.Tensor) -> Held:
        new = keys.shape[1]
        tokens = torch.arange(self.tokens_seen - new, self.tokens_seen, device=keys.device)
        tokens = tokens.float().expand(keys.shape[0], -1)
        if held is None:
            return Held(keys, values, tokens)
        fields = {
            name: torch.cat([old, old.new_zeros(old.shape[0], new)], dim=1)
            for name, old in held.fields.items()
        }
        weight = held.log_weight
        if weight is not None:
            weight = torch.cat([weight, weight.new_zeros(weight.shape[0], new)], dim=1)
        return Held(
            torch.cat([held.keys, keys], dim=1),
            torch.cat([held.values, values], dim=1),
            torch.cat([held.tokens, tokens], dim=1),
            fields,
            weight,
        )

    def _tables(self, scheme: Any, count: int, new: int, like: torch.Tensor) -> tuple[Any, Any]:
        key = (id(scheme), count)
        if key not in self._shared:
            if self.max_positions is not None and count > self.max_positions:
                raise ADMSValueError(
                    f"{count} entries need as many positions and the model was trained on "
                    f"{self.max_positions}; use a smaller compressed_budget or recent_size"
                )
            places = torch.arange(count, device=like.device)[None].float()
            fresh = places[:, count - new :]
            self._shared[key] = (
                scheme.tables(places, like, fresh),
                scheme.tables(fresh, like, fresh),
            )
        return self._shared[key]


_ACTIVE: ContextVar[SimulatedCache | None] = ContextVar("simulated_cache", default=None)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    cache = _ACTIVE.get()
    if cache is None:
        raise CacheStateError("the model was called outside its baseline's with block")
    if softcap is not None:
        raise UnsupportedModelError("baseline methods do not cover models with soft-capped scores")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return cache.attend(int(module.layer_idx), query, scale), None  # type: ignore[arg-type]


def _hand_over_unrotated(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook: positions are replaced by the rotation by nothing."""
    cos, sin = kwargs["position_embeddings"]
    still = (torch.ones_like(cos[:1, :1]), torch.zeros_like(sin[:1, :1]))
    return args, {**kwargs, "position_embeddings": still}


def _require_interface(attention: torch.nn.Module) -> None:
    """Refuses attention that takes no rotation from outside, or never asks for a function.

    Falcon and MPT compute attention themselves, so what is registered here would not be called.
    """
    forward = inspect.unwrap(type(attention).forward)
    takes_rotation = "position_embeddings" in inspect.signature(forward).parameters
    if not takes_rotation or "ALL_ATTENTION_FUNCTIONS" not in forward.__code__.co_names:
        raise UnsupportedModelError(
            "baseline methods need rotary positions that are handed to attention, which "
            f"{type(attention).__name__} does not take; for this model compare full, window, "
            "streaming and adms"
        )


@contextlib.contextmanager
def simulated(
    model: PreTrainedModel, policy: type[Policy], adms: ADMSKVCache
) -> Iterator[SimulatedCache]:
    """A baseline's cache on a model; the model is as before when the block ends.

    Args:
        model: a model with rotary positions.
        policy: the method.
        adms: a cache bound to the model, whose sizes and bytes the method gets.

    Raises:
        UnsupportedModelError: the family's positions are not rotary.
        ADMSValueError: the method cannot work in so few bytes or positions.
    """
    if not issubclass(policy, Policy):
        raise ADMSTypeError(f"policy must be a subclass of Policy, got {policy!r}")
    family = find_family(model)
    decoder = family.decoder(model)
    kinds = family.kinds(decoder)
    for attention in family.attentions(decoder):
        _require_interface(attention)
    if any(kind.plain is not None for kind in kinds):
        raise UnsupportedModelError("baseline methods do not cover models with sliding windows")
    itemsize = adms.binding_for_use.dtype.itemsize
    policies = [
        policy(Setting(adms.sizes, kind.shape, index, itemsize)) for index, kind in enumerate(kinds)
    ]
    needed = max(one.max_entries for one in policies) + adms.sizes.chunk
    limit = adms.sizes.max_positions
    if limit is not None and needed > limit:
        raise ADMSValueError(
            f"{policy.label} holds up to {needed} entries with the pass under way, and the model "
            f"was trained on {limit} positions; use a smaller compressed_budget or recent_size"
        )
    cache = SimulatedCache(
        policies, [kind.scheme for kind in kinds], adms.sizes.chunk, adms.max_nbytes, limit
    )
    if ATTENTION_NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _attention)
    settings: Any = decoder.config
    before = compat.get_attention(settings)
    hooks = [
        attention.register_forward_pre_hook(_hand_over_unrotated, with_kwargs=True)
        for attention in family.attentions(decoder)
    ]
    token = _ACTIVE.set(cache)
    compat.set_attention(settings, ATTENTION_NAME)
    try:
        yield cache
    finally:
        compat.set_attention(settings, before)
        _ACTIVE.reset(token)
        for hook in hooks:
            hook.remove()
