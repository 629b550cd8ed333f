"""The parts of the speed benchmark: each measures caches side by side and says what must hold.

Rows are those of ``latency.measure`` with ``part`` and ``way`` (through ``generate``, or a loop of
``steps``) before them. Parts yield rows as they come, so that a run that is cut short keeps them.
"""

from adms.evaluation.speed_bench import Part
from adms.evaluation.speed_parts.crossover import crossing, crossover, crossover_goals
from adms.evaluation.speed_parts.decoding import (
    batch1,
    batch1_goals,
    batch16,
    batch16_goals,
    context32k,
    context32k_goals,
    first_call,
)
from adms.evaluation.speed_parts.reading import memory, memory_goals, prefill, prefill_goals

__all__ = ["PARTS", "crossing"]

PARTS = {
    "batch1": Part("Batch 1", batch1, batch1_goals),
    "batch16": Part("Several streams at once", batch16, batch16_goals),
    "context32k": Part("A long context", context32k, context32k_goals),
    "prefill": Part("Reading", prefill, prefill_goals),
    "memory": Part("Memory", memory, memory_goals),
    "first_call": Part("The first call", first_call, lambda bench, rows: []),
    "crossover": Part("Against a cache that grows", crossover, crossover_goals),
}
