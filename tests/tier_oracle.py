"""What a one-layer Llama with an ADMS cache must compute, from the rules alone and in float64.

In one layer, a token's query, key (before positions) and value depend on its id only, so that a
memory can be kept as lists of ids: which tokens are sinks, which have gone through the middle, and
which are recent. No code of the cache is used but its configuration.
"""

from dataclasses import dataclass, field

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adms.compressors import Coder, Compressor, LayerContext
from adms.entries import Entries

VOCAB = 24
# Codes are multiples of 1 / STEPS, one byte each.
STEPS = 32


def quantise(values: torch.Tensor) -> torch.Tensor:
    """What the test's compressor makes of exact numbers."""
    return (values * STEPS).round().clamp(-127, 127) / STEPS


class ByteCoder(Coder):
    """A byte a number, with a fixed step: what it decodes to is known without it."""

    def __init__(self, context: LayerContext, nbytes: int, block: int) -> None:
        self.shape, self.dtype = context.shape, context.dtype
        self.block_tokens = self.entries_per_record = block
        self.record_bytes = block * context.shape.num_elements
        self.num_records = nbytes // self.record_bytes

    def fit(self, entries: Entries, queries: torch.Tensor | None = None) -> torch.Tensor:
        return torch.empty(1, 0, dtype=torch.uint8)

    def encode(
        self, header: torch.Tensor, entries: Entries, queries: torch.Tensor | None = None
    ) -> torch.Tensor:
        parts = [part.transpose(1, 2).flatten(2) for part in (entries.keys, entries.values)]
        codes = (quantise(torch.cat(parts, dim=2)) * STEPS).to(torch.int8).view(torch.uint8)
        whole = codes.shape[1] // self.block_tokens
        codes = codes[:, : whole * self.block_tokens]
        return codes.unflatten(1, (whole, self.block_tokens)).flatten(2)

    def decode(self, header: torch.Tensor, records: torch.Tensor) -> Entries:
        rows, count, _ = records.shape
        codes = records.contiguous().view(torch.int8).to(self.dtype) / STEPS
        codes = codes.view(rows, count * self.block_tokens, -1)
        split = self.shape.num_heads * self.shape.key_dim
        heads = (self.shape.num_heads, -1)
        return Entries(
            codes[..., :split].unflatten(2, heads).transpose(1, 2),
            codes[..., split:].unflatten(2, heads).transpose(1, 2),
        )


class ByteCompressor(Compressor):
    """``ByteCoder`` for configurations."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.name = f"test_byte_{block}"

    def block_tokens(self, config: object) -> int:
        return self.block

    def bind(self, context: LayerContext, nbytes: int, config: object) -> ByteCoder:
        return ByteCoder(context, nbytes, self.block)


def one_layer_model(max_positions: int) -> LlamaForCausalLM:
    """A Llama of one layer in float64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=max_positions,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than usual, so that attention depends strongly on positions and keys.
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4)
    return model


@dataclass
class Rules:
    """The sizes of a cache, as its documentation gives them."""

    sink: int
    recent: int
    budget: int
    interval: int
    chunk: int
    max_positions: int
    block: int
    elements: int

    @property
    def waiting(self) -> int:
        return self.interval - 1

    @property
    def exact_middle(self) -> int:
        return max(0, self.budget - self.waiting)

    @property
    def capacity(self) -> int:
        """Tokens held as bytes in the memory of that many at two bytes a number."""
        held = self.exact_middle * self.elements * 2 // (self.elements * self.block)
        return max(0, held) * self.block

    @property
    def room(self) -> int:
        return self.max_positions - self.sink - self.recent - self.interval - self.chunk

    def held(self, middle: list[int]) -> list[int]:
        """Those of all tokens that ever entered the middle which it still holds."""
        size = self.capacity if len(middle) > self.exact_middle else self.exact_middle
        return middle[max(0, len(middle) - size) :]


@dataclass
class Row:
    """One row's tokens by where they are; ``middle`` keeps all that ever entered it."""

    sinks: list[int] = field(default_factory=list)
    middle: list[int] = field(default_factory=list)
    recent: list[int] = field(default_factory=list)

    def copy(self) -> "Row":
        return Row(list(self.sinks), list(self.middle), list(self.recent))

    @property
    def seen(self) -> int:
        return len(self.sinks) + len(self.middle) + len(self.recent)

    def push(self, ids: list[int], rules: Rules) -> None:
        """Takes in the tokens of one pass."""
        self.recent += ids
        if len(self.recent) <= rules.recent + rules.waiting:
            return
        leave = len(self.recent) - rules.recent
        to_sink = min(leave, rules.sink - len(self.sinks))
        to_middle = (leave - to_sink) // rules.block * rules.block
        self.sinks += self.recent[:to_sink]
        self.middle += self.recent[to_sink : to_sink + to_middle]
        self.recent = self.recent[to_sink + to_middle :]


class Oracle:
    """The model's logits over rows of tiers."""

    def __init__(self, model: LlamaForCausalLM, rules: Rules) -> None:
        self.model, self.rules = model, rules
        layer = model.model.layers[0]
        self.attention = layer.self_attn
        with torch.no_grad():
            self.embedded = model.model.embed_tokens.weight
            normed = layer.input_layernorm(self.embedded)
            heads = (-1, model.config.head_dim)
            self.queries = layer.self_attn.q_proj(normed).unflatten(1, heads)
            self.keys = layer.self_attn.k_proj(normed).unflatten(1, heads)
            self.values = layer.self_attn.v_proj(normed).unflatten(1, heads)
        half = model.config.head_dim // 2
        theta = model.config.rope_parameters["rope_theta"]
        self.frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
        # The model computes its angles in float32.
        self.frequencies = self.frequencies.float()

    def rotate(self, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``[N, heads, D]`` at ``[N]``."""
        angles = (positions.float()[:, None] * self.frequencies)[:, None]
        cos, sin = angles.cos().double(), angles.sin().double()
        first, second = states.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    @torch.no_grad()
    def logits(self, row: Row, ids: list[int]) -> torch.Tensor:
        """``[len(ids), VOCAB]`` for one pass over a row, which stays as it is."""
        rules = self.rules
        coded = len(row.middle) > rules.exact_middle
        held = rules.held(row.middle)
        span = min(len(held), rules.room)
        index = torch.tensor([*row.sinks, *held, *row.recent, *ids])
        keys, values = self.keys[index], self.values[index]
        if coded:
            middle = slice(len(row.sinks), len(row.sinks) + len(held))
            keys[middle], values[middle] = quantise(keys[middle]), quantise(values[middle])
        start = len(row.sinks)
        positions = torch.cat(
            [
                torch.arange(start),
                start + torch.arange(len(held)) * (span / max(len(held), 1)),
                start + span + torch.arange(len(row.recent) + len(ids)),
            ]
        )
        new = len(ids)
        queries = self.rotate(self.queries[index[-new:]], positions[-new:])
        keys = self.rotate(keys, positions)
        group = queries.shape[1] // keys.shape[1]
        keys, values = (part.repeat_interleave(group, dim=1) for part in (keys, values))
        scores = torch.einsum("qhd,nhd->hqn", queries, keys) * queries.shape[-1] ** -0.5
        old = len(index) - new
        future = torch.ones(new, new, dtype=torch.bool).triu(1)
        scores[:, :, old:].masked_fill_(future, -torch.inf)
        mixed = torch.einsum("hqn,nhd->qhd", scores.softmax(-1), values).flatten(1)
        layer = self.model.model.layers[0]
        hidden = self.embedded[index[-new:]] + self.attention.o_proj(mixed)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(self.model.model.norm(hidden))

    def stream(self, row: Row, ids: list[int | None]) -> torch.Tensor:
        """Logits of a whole call, split as the cache splits it, into ``row``; None is padding."""
        chunk, parts = self.rules.chunk, []
        first = len(ids) % chunk or min(chunk, len(ids))
        bounds = [0, *range(first, len(ids), chunk), len(ids)]
        for start, stop in zip(bounds, bounds[1:], strict=False):
            real = [token for token in ids[start:stop] if token is not None]
            if real:
                parts.append(self.logits(row, real))
                row.push(real, self.rules)
        return torch.cat(parts) if parts else torch.empty(0, VOCAB, dtype=torch.float64)
