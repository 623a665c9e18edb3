"""Move results to the CPU while the device goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


class Download:
    """Tensors on their way to the CPU.

    On CUDA a tensor that is added is copied to page-locked memory, behind the kernels that compute it; masks travel
    as one bit per pixel. `wait` blocks until the last copy is done: kernels that were launched after it go on. Tensors
    on the CPU are handed over as they are.

    >>> import torch
    >>> download = Download()
    >>> download.add(torch.tensor([[True, False]]))
    >>> download.wait()
    [array([[ True, False]])]
    """

    def __init__(self) -> None:
        self._items: list[tuple[Tensor, tuple[int, ...] | None]] = []  # with the shape of packed masks
        self._copied: Any = None  # event after the last copy

    def add(self, tensor: Tensor) -> None:
        """Start to copy a tensor of any shape; bool, or a dtype that NumPy has."""
        import torch

        if not tensor.is_cuda:
            self._items.append((tensor.cpu(), None))
            return
        shape = tuple(tensor.shape) if tensor.dtype == torch.bool else None
        source = tensor if shape is None else pack_bits(tensor)
        target = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        target.copy_(source, non_blocking=True)
        self._items.append((target, shape))
        self._copied = torch.cuda.current_stream(tensor.device).record_event()

    def wait(self) -> list[NDArray[Any]]:
        """Return all tensors as arrays, in the order in which they were added."""
        if self._copied is None:
            return [tensor.numpy() for tensor, _ in self._items]
        self._copied.synchronize()
        # What is returned leaves the page-locked memory, which is for the next copies.
        return [
            tensor.numpy().copy() if shape is None else unpack_bits(tensor.numpy(), shape)
            for tensor, shape in self._items
        ]


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a tensor of bools, eight to a byte, in the order of `numpy.packbits`.

    Args:
        mask: Any shape, bool.

    Returns:
        A tensor `(ceil(numel / 8),) uint8` on the same device.

    >>> import torch
    >>> pack_bits(torch.tensor([True, False, True]))
    tensor([160], dtype=torch.uint8)
    """
    import torch

    flat = mask.reshape(-1).view(torch.uint8)
    bytes_ = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    place = 7 - torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bytes_ << place).sum(1, dtype=torch.uint8)


def unpack_bits(bits: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Unpack what `pack_bits` has packed.

    >>> unpack_bits(np.array([160], np.uint8), (3, 1)).tolist()
    [[True], [False], [True]]
    """
    return np.unpackbits(bits, count=int(np.prod(shape))).view(bool).reshape(shape)
