"""The gradient of a read of `DynamicAttention`, whose result is known before autograd sees it.

Shapes: `...` leading dimensions, `Q` queries read, `C` slots of entries, `E` value size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adms.attention.dynamic.sums import scores_of


class AttentionRead(torch.autograd.Function):
    """A result that is already known, with the gradient of dense attention. Differentiable once.

    The backward pass scores `chunk_size` query rows at a time, all at once for None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        result: Tensor,
        live: Tensor,
        scale: float,
        chunk_size: int | None,
    ) -> Tensor:
        """Returns `result`, the attention [..., Q, E] of the other arguments."""
        ctx.save_for_backward(queries, keys, values, live)
        ctx.scale, ctx.chunk_size = scale, chunk_size
        return result.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values; slots that hold no entry get 0."""
        queries, keys, values, live = ctx.saved_tensors
        (grad,) = grads
        grad_queries = torch.empty_like(queries)
        grad_keys = torch.zeros_like(keys)
        grad_values = torch.zeros_like(values)
        step = ctx.chunk_size or max(1, queries.shape[-2])
        for start in range(0, queries.shape[-2], step):
            part = (..., slice(start, start + step), slice(None))
            weights = torch.softmax(scores_of(queries[part], keys, live, ctx.scale), -1)
            flow = grad[part] @ values.transpose(-1, -2)
            flow = weights * (flow - (flow * weights).sum(-1, keepdim=True)) * ctx.scale
            grad_values += weights.transpose(-1, -2) @ grad[part]
            grad_queries[part] = flow @ keys
            grad_keys += flow.transpose(-1, -2) @ queries[part]
        return grad_queries, grad_keys, grad_values, None, None, None, None
