"""Many small launches as one: a function of tensors, recorded as a CUDA graph and replayed.

What chooses blocks works on summaries, a few thousandths of the keys: a hundred kernels that the
device finishes sooner than they can be launched one by one.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from adms.step_capture import capturing

# Recordings that one object keeps: lengths that alternate, such as those of two layers' inputs.
_MOST_RECORDINGS = 4


@dataclass(frozen=True)
class _Recording:
    """A graph and where it reads and writes; ``held`` is what else it reads."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]
    held: object


class Replay:
    """Runs functions of tensors on CUDA, from the second call on as one launch."""

    def __init__(self) -> None:
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()

    @staticmethod
    def applies(like: Tensor) -> bool:
        """Whether a function of tensors on the device of ``like`` can be recorded now."""
        return (
            like.is_cuda
            and not torch.is_grad_enabled()
            # Autocast keeps copies of the weights, which a recording would go on reading.
            and not torch.is_autocast_enabled()
            and not torch.compiler.is_compiling()
            and not torch.cuda.is_current_stream_capturing()
        )

    def __call__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        inputs: list[Tensor],
        key: Hashable,
        held: object,
    ) -> tuple[Tensor, ...]:
        """What ``function(*inputs)`` gives, in tensors of the caller's own.

        Args:
            function: does the same launches for the same shapes and ``key``, and waits for none.
            inputs: tensors that differ between calls, on CUDA.
            key: all that makes the function another one.
            held: what the function reads beside its inputs, kept as long as the recording.
        """
        stream = torch.cuda.current_stream(inputs[0].device)
        shapes = tuple((x.shape, x.dtype) for x in inputs)
        key = (key, shapes, inputs[0].device, stream.cuda_stream)
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._recordings[key] = _record(function, inputs, held, stream)
            if len(self._recordings) > _MOST_RECORDINGS:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        torch._foreach_copy_(recording.inputs, inputs)
        recording.graph.replay()
        return tuple(output.clone() for output in recording.outputs)


def _record(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: list[Tensor],
    held: object,
    stream: torch.cuda.Stream,
) -> _Recording:
    # What is made in inference mode could not be written outside of it.
    with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(inputs[0].device):
        own = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
        # Libraries set themselves up on first use, which must not be recorded.
        aside = torch.cuda.Stream()
        aside.wait_stream(stream)
        with torch.cuda.stream(aside):
            function(*own)
        stream.wait_stream(aside)
        shared = _pool(inputs[0].device, stream.cuda_stream)
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, inputs[0].device, shared.pool()):
            outputs = function(*own)
    return _Recording(graph, own, outputs, held)


@functools.cache
def _pool(device: torch.device, stream: int) -> torch.cuda.CUDAGraph:
    """A graph in whose working memory others are recorded, which never run at once on one stream.

    It is kept because memory that no graph is left in cannot be recorded into again.
    """
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, device):
        torch.zeros(1, device=device)
    return graph
