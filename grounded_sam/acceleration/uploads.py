"""Copy images and tables to a device without waiting for it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Largest number of images that are kept on devices for later calls, and their largest total size in bytes.
MAX_KEPT, MAX_KEPT_BYTES = 16, 256 * 2**20


@dataclass(frozen=True)
class DeviceCopy:
    """A tensor on a device, whose copy may still be under way.

    Attributes:
        tensor: The tensor.
        copied: CUDA event after the copy; None if it is complete.
    """

    tensor: Tensor
    copied: Any = None

    def get(self) -> Tensor:
        """Return the tensor, for use on the current stream of its device."""
        if self.copied is not None:
            import torch

            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self.copied)  # it may have been copied on another stream, for another thread
            self.tensor.record_stream(stream)
        return self.tensor


def copy_to_device(array: NDArray[Any], device: Any) -> DeviceCopy:
    """Copy an array to a device; to CUDA through page-locked memory, without waiting for the copy.

    Page-locked memory comes from PyTorch's allocator, which reuses it once the copies that read it are complete. On the
    CPU the tensor shares the memory of the array if that is contiguous and may be written to.

    Args:
        array: Any array; it may be changed afterwards, except on the CPU.
        device: A `torch.device` or its name.

    >>> copy_to_device(np.ones((2, 3), np.uint8), "cpu").get().shape
    torch.Size([2, 3])
    """
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        return DeviceCopy(torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device))
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    staging = torch.empty(array.shape, dtype=dtype, pin_memory=True)
    staging.numpy()[...] = array
    with torch.cuda.device(device):
        tensor = staging.to(device, non_blocking=True)
        return DeviceCopy(tensor, torch.cuda.current_stream().record_event())


class PictureUploads:
    """Images on devices, kept for the stages that ask for the same array.

    A copy is dropped with its array, or when `max_kept` or `max_bytes` are exceeded, the oldest first. Any thread may
    call it.

    Args:
        max_kept: Largest number of copies.
        max_bytes: Largest total size of the copies in bytes.
    """

    def __init__(self, max_kept: int = MAX_KEPT, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self.max_kept, self.max_bytes = max_kept, max_bytes
        self._copies: dict[tuple[int, str], tuple[weakref.ref[NDArray[np.uint8]], DeviceCopy]] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._copies)

    def get(self, image: NDArray[np.uint8], device: torch.device, keep: bool) -> Tensor:
        """Return an image on a device; see `upload`."""
        key = (id(image), str(device))
        with self._lock:
            found = self._copies.get(key)
            if found is not None:
                return found[1].get()
            copy = copy_to_device(image, device)
            if keep:
                self._copies[key] = weakref.ref(image, lambda _: self._drop(key)), copy
                self._shrink()
        return copy.tensor

    def _drop(self, key: tuple[int, str]) -> None:
        """Drop the copy of an array that is being deleted.

        Takes no lock, since garbage collection can delete the array while this thread holds it. No other array has the
        same id yet.
        """
        self._copies.pop(key, None)

    def _shrink(self) -> None:
        """Drop the oldest copies beyond the limits."""
        copies = self._copies.copy()
        total = sum(copy.tensor.nbytes for _, copy in copies.values())
        for key, (_, copy) in copies.items():
            if len(self._copies) <= self.max_kept and total <= self.max_bytes:
                break
            self._copies.pop(key, None)
            total -= copy.tensor.nbytes


_UPLOADS = PictureUploads()


def upload(image: NDArray[np.uint8], device: Any, keep: bool = False) -> Tensor:
    """Return an image on a device, copied there at most once if it is kept.

    Args:
        image: RGB, `(H, W, 3) uint8`.
        device: A `torch.device` or its name.
        keep: Keep the copy on CUDA for later calls with the same array, which must not be changed while it exists.
            `Frame.image` is such an array. Other callers get what is there, and keep nothing.

    Returns:
        A tensor `(H, W, 3) uint8` that must not be written to.

    >>> upload(np.zeros((4, 6, 3), np.uint8), "cpu").shape
    torch.Size([4, 6, 3])
    """
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        return copy_to_device(image, device).tensor
    index = torch.cuda.current_device() if device.index is None else device.index
    return _UPLOADS.get(image, torch.device("cuda", index), keep)
