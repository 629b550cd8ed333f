"""What enabling did to a model, and how a configuration is resolved on it."""

import dataclasses
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from adms import compat
from adms.attention.span_learner import IntegratedAttentionConfig
from adms.attention.sparse_prefill import SparsePrefillConfig
from adms.binding import Binding
from adms.calibration import Calibration
from adms.compressors import resolve_compressor
from adms.compressors.base import LayerContext
from adms.config import ADMSConfig, Sizes, check_layer_config, resolve_sizes
from adms.entries import TokenShape
from adms.errors import ADMSValueError, CacheStateError
from adms.gates.coder import put_gate
from adms.gates.config import AdaptiveUpdateConfig
from adms.importance import METRICS
from adms.kernels import Kernel
from adms.moments import fit_to_own_texts, plan_calibration
from adms.patches import Family
from adms.ranks import Ranks

Undo = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class OptionalLayers:
    """What a cache may have beside its tiers; see ``enable_adms_llm``.

    Raises:
        ADMSTypeError: a value of the wrong type.
    """

    adaptive_update: AdaptiveUpdateConfig | None = None
    integrated_attention: IntegratedAttentionConfig | None = None
    sparse_prefill: SparsePrefillConfig | None = None

    def __post_init__(self) -> None:
        check_layer_config(self.adaptive_update, AdaptiveUpdateConfig, "adaptive_update")
        check_layer_config(
            self.integrated_attention, IntegratedAttentionConfig, "integrated_attention"
        )
        check_layer_config(self.sparse_prefill, SparsePrefillConfig, "sparse_prefill")


@dataclass(eq=False)
class Installation:
    """What enabling did to one model."""

    family: Family
    model_key: weakref.ReferenceType[nn.Module]
    undo: list[Undo] = field(default_factory=list)
    active: bool = True
    #: names of the attention function in force, and of the one before; None: the family's own
    attention: tuple[str, str] | None = None
    own_calibration: Calibration | None = None

    def _own_calibration(self, model: nn.Module) -> Calibration:
        """The model's calibration to texts of its own, fitted when first needed."""
        if self.own_calibration is None:
            self.own_calibration = plan_calibration(model, self.family)
        return self.own_calibration

    def _fit(self, calibration: Calibration) -> None:
        model = self.model_key()
        if model is None:
            raise CacheStateError("the model of this installation is gone")
        fit_to_own_texts(model, calibration)

    def binding(
        self,
        config: ADMSConfig,
        optional: OptionalLayers | None = None,
        calibration: Calibration | None = None,
        kernel: Kernel = "auto",
    ) -> Binding:
        """A configuration resolved on this model.

        Raises:
            ADMSValueError: the configuration does not fit the model, or names something unknown.
        """
        model = self.model_key()
        if model is None:
            raise CacheStateError("the model of this installation is gone")
        decoder = self.family.decoder(model)
        metric = METRICS.get(config.importance_metric)
        compressor = resolve_compressor(config)
        layers = OptionalLayers() if optional is None else optional
        gates: tuple[torch.Tensor, ...] = ()
        if layers.adaptive_update is not None:
            if compressor is None:
                raise ADMSValueError(
                    "adaptive_update folds tokens that enter the middle, and compressed_budget=0 "
                    "leaves none; give it a budget, or leave adaptive_update out"
                )
            compressor, gates = put_gate(compressor, layers.adaptive_update, model)
        block = compressor.block_tokens(config) if compressor is not None else 1
        sizes = resolve_sizes(
            config,
            self.family.max_positions(decoder.config),
            block,
            self.family.default_sinks(decoder.config),
        )

        ranks = Ranks.of(compat.tensor_parallel_group(model))
        uses = compressor is not None and compressor.uses_calibration
        if calibration is not None and not uses:
            raise ADMSValueError(
                f"compressor_type={config.compressor_type!r} makes no use of a calibration; leave "
                "it out"
            )
        calibration = (calibration or self._own_calibration(model)) if uses else None

        def context(layer_idx: int, shape: TokenShape, dtype: torch.dtype) -> LayerContext:
            own = None if calibration is None else calibration.layers[layer_idx]
            # A family may keep further layers after those of its attentions.
            gate = gates[layer_idx] if layer_idx < len(gates) else None
            return LayerContext(shape, dtype, layer_idx, calibration=own, gate=gate)

        def bind(sizes: Sizes, block: int) -> Binding:
            kinds = [*self.family.kinds(decoder), *self.family.further_kinds(decoder, sizes)]
            if layers.sparse_prefill is not None:
                layers.sparse_prefill.check_kinds(kinds)
            return Binding(
                model_key=self.model_key,
                config=config,
                sizes=sizes,
                kinds=kinds,
                dtype=self.family.dtype(decoder),
                compressor=compressor,
                metric=metric,
                block_tokens=block,
                is_active=lambda: self.active,
                context=context,
                kernel=kernel,
                # Ranks wait for one another in a pass, and each would capture at a time of its own.
                captures=self.family.captures and ranks.size == 1,
                ranks=ranks,
                calibration=calibration,
                fit=self._fit,
                gates=gates,
                sparse_prefill=layers.sparse_prefill,
                integrated_attention=layers.integrated_attention,
            )

        binding = bind(sizes, block if sizes.interval >= block else 1)
        if sizes.budget and not binding.codes_anything:
            # Tokens wait to be coded together; where the bytes are too few to code, none need wait.
            binding = bind(dataclasses.replace(sizes, interval=1), 1)
        return binding
