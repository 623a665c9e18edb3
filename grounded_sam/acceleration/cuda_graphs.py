"""Replay the kernels of a function as a CUDA graph, one launch instead of thousands."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

#: Calls with the same shapes before the graph is captured, so that sizes that occur once cost nothing extra.
CALLS_BEFORE_CAPTURE = 2


@dataclass
class _Graph:
    """A captured graph.

    Attributes:
        graph: The graph.
        inputs: Tensors that it reads.
        outputs: Tensors that it writes, nested as the function returned them.
    """

    graph: Any
    inputs: tuple[Tensor, ...]
    outputs: Any


class GraphedFunction:
    """Run a function of CUDA tensors as a CUDA graph, one graph for each combination of shapes and dtypes.

    The function must launch the same kernels whenever shapes and dtypes are the same: it may not read a value back to
    the CPU, and tensors that it takes from elsewhere, such as weights, must stay where they are. It runs as it is on
    other devices, on the first calls with new shapes, and where a capture fails, which is logged once. Calls from
    several threads are serialized.

    Args:
        function: Function of tensors that returns tensors, nested in tuples, lists and dicts.
        name: Name of the function, for the log.
        max_graphs: Number of graphs that are kept; what was not used for longest goes first.

    >>> import torch
    >>> double = GraphedFunction(lambda x: (2 * x,), "double")
    >>> double(torch.ones(2))
    (tensor([2., 2.]),)
    """

    def __init__(self, function: Callable[..., Any], name: str, max_graphs: int = 16) -> None:
        self.function, self.name, self.max_graphs = function, name, max_graphs
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._calls: Counter[Hashable] = Counter()
        self._pool: Any = None
        self._done: Any = None  # event after the last replay, whose memory the next one overwrites
        self._failed = False
        self._lock = Lock()

    def __call__(self, *inputs: Tensor) -> Any:
        """Call the function.

        Args:
            *inputs: Tensors on one device.

        Returns:
            What the function returns. The tensors belong to the caller: later calls do not overwrite them.
        """
        if self._failed or not inputs or not all(x.is_cuda for x in inputs):
            return self.function(*inputs)
        import torch

        key = tuple((x.shape, x.stride(), x.dtype, x.device) for x in inputs)
        with self._lock, torch.cuda.device(inputs[0].device):
            graph = self._graphs.get(key)
            if graph is None:
                self._calls[key] += 1
                if self._calls[key] <= CALLS_BEFORE_CAPTURE:
                    return self.function(*inputs)
                graph = self._capture(inputs)
                if graph is None:
                    return self.function(*inputs)
                self._graphs[key] = graph
                if len(self._graphs) > self.max_graphs:
                    torch.cuda.current_stream().synchronize()  # it may still be running
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)  # the last call may have been on another stream
            for static, value in zip(graph.inputs, inputs, strict=True):
                static.copy_(value, non_blocking=True)
            graph.graph.replay()
            outputs = map_tensors(graph.outputs, lambda x: x.clone())
            self._done = stream.record_event()
            return outputs

    def _capture(self, inputs: tuple[Tensor, ...]) -> _Graph | None:
        """Capture the function for the shapes of some inputs; None if that fails."""
        import torch

        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()  # graphs never run at the same time, so they share memory
        try:
            static = tuple(x.detach().clone(memory_format=torch.preserve_format) for x in inputs)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.function(*static)  # libraries initialize themselves for these shapes
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = self.function(*static)
        except Exception as failure:  # whatever cannot be captured; an error of the function is raised by the next call
            log.warning("%s runs without a CUDA graph: %s", self.name, " ".join(str(failure).split())[:200])
            self._failed = True
            torch.cuda.synchronize()
            return None
        return _Graph(graph, static, outputs)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to all tensors in nested tuples, lists and dicts.

    >>> import torch
    >>> map_tensors({"a": (torch.ones(1), None)}, lambda x: x + 1)
    {'a': (tensor([2.]), None)}
    """
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [map_tensors(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)  # a NamedTuple, or any other
    return value if value is None else function(value)
