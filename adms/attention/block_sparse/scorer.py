"""How important a block of keys is to a block of queries, judged by their summaries.

Shapes: `B` batch, `H` query heads, `K` KV heads, `Q` queries, `N` keys or tokens, `D` head size,
`I` query blocks, `J` key blocks, `P` patterns with parameters of their own (`H`, or 1 if shared).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from adms.errors import ADMSValueError

# Elements of the pair scorer's hidden layer at a time where no graph must be kept: 1 MiB, within a
# core's cache, and on devices with many 64 MiB.
_HIDDEN_ELEMENTS = {"cpu": 2**18}


def summarize_blocks(x: Tensor, block_size: int) -> Tensor:
    """Mean [B, H, J, D] over each block of `block_size` tokens of x [B, H, N, D], in float32.

    A partial last block is the mean of the tokens it has. float64 stays float64.
    """
    return _cut(x, block_size).sum(-2, dtype=_wide(x)) / _block_lengths(x, block_size)


def block_mean_squares(x: Tensor, block_size: int) -> Tensor:
    """Mean square [B, H, J, 1] of the elements of each block of x [B, H, N, D], in float32."""
    norms = torch.linalg.vector_norm(_cut(x, block_size), dim=(-1, -2), dtype=_wide(x))
    return norms.square().unsqueeze(-1) / (_block_lengths(x, block_size) * x.shape[-1])


def first_of_blocks(x: Tensor, block_size: int) -> Tensor:
    """First token [B, H, I, D] of each block of x [B, H, Q, D], in float32 (or float64)."""
    return x[..., ::block_size, :].to(_wide(x))


def block_mean_scores(q_summary: Tensor, k_summary: Tensor) -> Tensor:
    """Training-free scores [B, H, I, J]: block means' dot products, divided by sqrt(D).

    `q_summary` [B, H, I, D]; `k_summary` [B, K, J, D], whose heads serve H / K query heads each.

    Raises:
        ADMSValueError: H is no multiple of K.

    Source: Jiang et al. (2024), MInference, arXiv:2407.02490 (block-sparse heads).
    """
    heads, kv_heads = q_summary.shape[1], k_summary.shape[1]
    if heads % kv_heads:
        raise ADMSValueError(
            f"query heads must be a multiple of KV heads, got {heads} and {kv_heads}"
        )
    grouped = q_summary.unflatten(1, (kv_heads, heads // kv_heads))
    scores = grouped @ k_summary.unsqueeze(2).transpose(-1, -2)
    return scores.flatten(1, 2) / math.sqrt(q_summary.shape[-1])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _cut(x: Tensor, block_size: int) -> Tensor:
    """[B, H, N, D] as [B, H, J, block_size, D], padded with zeros only where it must be."""
    missing = -x.shape[-2] % block_size
    return (pad(x, (0, 0, 0, missing)) if missing else x).unflatten(-2, (-1, block_size))


def _block_lengths(x: Tensor, block_size: int) -> Tensor | int:
    """Tokens in each block: [J, 1], or one number where all are whole."""
    tokens = x.shape[-2]
    if tokens % block_size == 0:
        return block_size
    starts = torch.arange(0, tokens, block_size, device=x.device)
    return (tokens - starts).clamp(max=block_size).unsqueeze(-1)


class HeadwiseLinear(nn.Module):
    """A linear layer [B, P, ..., in] -> [B, P, ..., out] with weights of its own for each P."""

    def __init__(self, patterns: int, inputs: int, outputs: int, *, bias: bool = True) -> None:
        """Draws weights uniformly within 1/sqrt(inputs), as `nn.Linear`."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(patterns, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(patterns, outputs)) if bias else None
        nn.init.uniform_(self.weight, -(inputs**-0.5), inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Maps the last axis."""
        shape = x.shape
        x = x.flatten(2, -2) @ self.weight
        if self.bias is not None:
            x = x + self.bias.unsqueeze(1)
        return x.unflatten(2, shape[2:-1]) if len(shape) > 4 else x


class ImportanceScorer(nn.Module):
    """Importance [B, P, I, J] of every key block to every query block.

    The score is `gain * match + mlp([q_summary, k_summary])`. `match` is the dot product of
    linearly mapped summaries, standardised over a row's candidates; the maps start as the
    identity, so that an untrained scorer orders blocks as `block_mean_scores` does, up to the
    small start of the MLP. A row's common offset cannot change a selection: the MLP's last layer
    has no bias.

    Source: the concatenated-summary MLP is the sources'; the matched projections follow Gao et
    al. (2024), SeerAttention, arXiv:2410.13276.
    """

    def __init__(
        self, head_dim: int, patterns: int = 1, hidden_dim: int = 128, num_layers: int = 2
    ) -> None:
        """Makes the maps and the MLP; `num_layers` counts its linear layers."""
        super().__init__()
        identity = torch.eye(head_dim).repeat(patterns, 1, 1)
        self.query_map = nn.Parameter(identity.clone())
        self.key_map = nn.Parameter(identity.clone())
        # 3 standard deviations: the untrained order prevails over Gumbel noise (1.3).
        self.gain = nn.Parameter(torch.full((patterns, 1, 1), 3.0))
        width = hidden_dim if num_layers > 1 else 1
        self.query_layer = HeadwiseLinear(patterns, head_dim, width, bias=num_layers > 1)
        self.key_layer = HeadwiseLinear(patterns, head_dim, width, bias=False)
        sizes = [hidden_dim] * (num_layers - 1) + [1] * (num_layers > 1)
        self.layers = nn.ModuleList(
            HeadwiseLinear(patterns, sizes[n], sizes[n + 1], bias=n + 2 < len(sizes))
            for n in range(len(sizes) - 1)
        )
        with torch.no_grad():
            last = self.layers[-1] if num_layers > 1 else self.key_layer
            last.get_parameter("weight").mul_(0.1)

    def forward(
        self, q_summary: Tensor, k_summary: Tensor, candidates: Tensor | None = None
    ) -> Tensor:
        """Scores summaries [B, P, I, D] and [B, P, J, D]; `candidates` bool [I, J] or None."""
        q_summary = q_summary.to(self.gain.dtype)
        k_summary = k_summary.to(self.gain.dtype)
        match = (q_summary @ self.query_map) @ (k_summary @ self.key_map).transpose(-1, -2)
        return self.gain * _standardised(match, candidates) + self._mlp(q_summary, k_summary)

    def _mlp(self, q_summary: Tensor, k_summary: Tensor) -> Tensor:
        # A linear layer of a concatenation is the sum of one of each part: I + J instead of I * J.
        from_keys = self.key_layer(k_summary).unsqueeze(2)
        from_queries = self.query_layer(q_summary).unsqueeze(3)
        rows = from_queries.shape[2]
        if not torch.is_grad_enabled():
            most = _HIDDEN_ELEMENTS.get(q_summary.device.type, 2**24)
            rows = max(1, most // max(1, from_keys.numel()))
        parts = []
        for part in from_queries.split(rows, 2):
            hidden = part + from_keys
            for layer in self.layers:
                hidden = layer(gelu(hidden))
            parts.append(hidden.squeeze(-1))
        return torch.cat(parts, 2)


class BudgetPredictor(nn.Module):
    """How many connections a row of blocks needs, in [-1, 1]: fewer to more than the base.

    Judged by the query summary, the mean of the candidates' summaries, and how much keys vary
    within and between blocks. Starts near 0.
    """

    def __init__(self, head_dim: int, patterns: int = 1, hidden_dim: int = 128) -> None:
        """Makes a two-layer MLP."""
        super().__init__()
        self.first = HeadwiseLinear(patterns, 2 * head_dim + 2, hidden_dim)
        self.last = HeadwiseLinear(patterns, hidden_dim, 1)
        with torch.no_grad():
            self.last.weight.mul_(0.1)

    def forward(
        self, q_summary: Tensor, k_summary: Tensor, k_squares: Tensor, candidates: Tensor
    ) -> Tensor:
        """Budget [B, P, I].

        Args:
            q_summary: [B, P, I, D].
            k_summary: [B, P, J, D].
            k_squares: Mean square of each block's keys' elements, [B, P, J, 1].
            candidates: Blocks to judge by, bool [I, J].
        """
        shares = candidates.to(k_summary.dtype)
        shares = shares / shares.sum(-1, keepdim=True).clamp(min=1.0)
        mean = shares @ k_summary
        of_blocks = k_summary.square().mean(-1, keepdim=True)
        within = shares @ (k_squares - of_blocks)
        between = shares @ of_blocks - mean.square().mean(-1, keepdim=True)
        # Logarithms tell none from little; the clamp is for differences that round below 0.
        spread = torch.cat([within, between], -1).clamp(min=0.0).add(1e-6).log() / 4.0
        features = torch.cat([q_summary, mean, spread], -1).to(self.first.weight.dtype)
        return torch.tanh(self.last(gelu(self.first(features)))).squeeze(-1)


def _standardised(match: Tensor, candidates: Tensor | None) -> Tensor:
    """Rows [..., J] shifted and scaled to mean 0 and deviation 1 over the candidates."""
    if candidates is None:
        candidates = torch.ones(match.shape[-2:], dtype=torch.bool, device=match.device)
    weights = candidates.to(match.dtype)
    counts = weights.sum(-1, keepdim=True).clamp(min=1.0)
    centred = match - (match * weights).sum(-1, keepdim=True) / counts
    variance = (centred.square() * weights).sum(-1, keepdim=True) / counts
    # Relative to the size of what was subtracted, so that rounding is not blown up to 1.
    floor = 1e-6 * (match.detach().square() * weights).sum(-1, keepdim=True) / counts + 1e-12
    return centred / (variance + floor).sqrt()
