"""Tracking with the memory of SAM 2 (Ravi et al. 2024), with the package `sam2` of its authors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.acceleration.options import ModelOptions
from grounded_sam.acceleration.patching import inference, to_device
from grounded_sam.acceleration.sam2 import memory_takes_lengths, speed_up_memory
from grounded_sam.acceleration.transfer import Download
from grounded_sam.checks import check_int
from grounded_sam.segmenters.base import upsample_masks
from grounded_sam.segmenters.options import model_identity
from grounded_sam.segmenters.sam2 import INSTEAD, ImageFeatures, Sam2, Size, sam2_hub_file
from grounded_sam.structures.detections import tracked_detections
from grounded_sam.trackers.base import MemorySession, MemoryTracker, find_shared
from grounded_sam.trackers.options import TrackerOptions
from grounded_sam.trackers.prompting import mask_prompt, oldest_dispensable, to_mask_input, to_pixels, to_points
from grounded_sam.trackers.sam2_model import Memories, ObjectModel, Propagated, join_memories
from grounded_sam.weights.hub import HubFile
from grounded_sam.weights.packages import import_package

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class ObjectMemory:
    """Memory of one object; frames are numbered within the session.

    Prompted frames (conditioning frames) are kept until there are more than `max_prompts`. Of other frames, the mask
    memory of the last `num_maskmem - 1` and the pointers of the last `max_obj_ptrs_in_encoder - 1` are kept, since
    memory attention reaches no further back.

    Attributes:
        prompted: Mask memory `(1, 64, h, w) bfloat16` and object pointer `(1, C)` of prompted frames, by frame.
        features: Mask memory of other frames, by frame.
        pointers: Object pointers of other frames, by frame.
    """

    prompted: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    features: dict[int, Tensor] = field(default_factory=dict)
    pointers: dict[int, Tensor] = field(default_factory=dict)

    def prune(self, frame: int, num_features: int, num_pointers: int, max_prompts: int) -> None:
        """Drop what memory attention no longer reaches at a frame, and surplus prompted frames.

        Args:
            frame: The frame.
            num_features: Frames whose mask memory is reached, with the current one.
            num_pointers: Frames whose pointers are reached, with the current one.
            max_prompts: Largest number of prompted frames to keep.
        """
        for old in [f for f in self.features if f <= frame - num_features]:
            del self.features[old]
        for old in [f for f in self.pointers if f <= frame - num_pointers]:
            del self.pointers[old]
        while len(self.prompted) > max_prompts:
            del self.prompted[oldest_dispensable(list(self.prompted), max_prompts)]

    def forget_frame(self, frame: int) -> None:
        """Drop the memory of a frame, unless it was prompted."""
        self.features.pop(frame, None)
        self.pointers.pop(frame, None)


class FrameResults:
    """Results of the objects of a frame on their way to the CPU.

    Args:
        count: Number of objects.
        size_hw: Height and width of the frame in pixels.
    """

    def __init__(self, count: int, size_hw: tuple[int, int]) -> None:
        self.count, self.size_hw = count, size_hw
        self._download = Download()
        self._rows: list[tuple[list[int], bool]] = []  # of each tensor, and whether it holds masks

    def add(self, rows: list[int], logits: Tensor, presence: Tensor, iou: Tensor) -> None:
        """Add some objects.

        Args:
            rows: Their places in the results.
            logits: Mask logits, `(n, 1, h, w)`.
            presence: Logits of presence, `(n, 1)`.
            iou: Predicted IoU, `(n,)`.
        """
        import torch

        self._download.add(torch.stack([presence[:, 0].float().sigmoid(), iou.float()]))
        self._rows.append((rows, False))
        first = 0
        for masks in upsample_masks(logits[:, 0], self.size_hw):
            self._download.add(masks)
            self._rows.append((rows[first : first + len(masks)], True))
            first += len(masks)

    def wait(self) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]:
        """Return masks `(n, H, W)`, confidence that each object is present, and predicted IoU."""
        masks = np.empty((self.count, *self.size_hw), bool)
        scores = np.empty((2, self.count), np.float32)
        for (rows, are_masks), values in zip(self._rows, self._download.wait(), strict=True):
            if are_masks:
                masks[rows] = values
            else:
                scores[:, rows] = values
        return masks, scores[0], scores[1]


class Sam2Session(MemorySession):
    """Track the objects of one video with SAM 2; of earlier frames only the memories of the objects are kept.

    Masks equal those of `SAM2VideoPredictor.propagate_in_video` with the same weights and the post-processing of
    `build_sam2_video_predictor`. The device is waited for once per call.

    Args:
        tracker: The tracker that opens the session.
        size_hw: Height and width of the frames in pixels.

    Attributes:
        memories: Memory of each object by id, in the order in which they were added.
        objects: The model.
    """

    def __init__(self, tracker: Sam2Tracker, size_hw: tuple[int, int]) -> None:
        super().__init__(tracker, size_hw)
        self.chunk, self.objects = tracker.chunk, tracker.objects
        self.memories: dict[int, ObjectMemory] = {}
        self._encode, self._pads, self._encodes_ahead = tracker.encode, tracker.pads, tracker.encodes_ahead
        self._encoded: list[tuple[NDArray[np.uint8], ImageFeatures]] = []  # of the current image, and one other
        self._next: NDArray[np.uint8] | None = None

    def image_features(self, image: NDArray[np.uint8]) -> ImageFeatures:
        """Return the feature maps of an image; the current and the announced one are encoded once."""
        for known, features in self._encoded:
            if known is image:
                return features
        pixels = to_pixels(image, self.model.image_size, self.model.device)
        with inference():
            features = self._encode(pixels)
        self._encoded = [entry for entry in self._encoded if entry[0] is self._image] + [(image, features)]
        return features

    def encode_ahead(self, image: NDArray[np.uint8]) -> None:
        """Announce the next frame; see `structures.protocols.EncodesAhead`.

        On CUDA it is encoded while the masks of the current frame are on their way to the CPU, if there are any.
        """
        self._next = image if self._encodes_ahead else None

    def step(self, image: NDArray[np.uint8]) -> sv.Detections:
        """Advance to the next frame and return the visible objects, in the order in which they were added.

        Args:
            image: RGB, `(H, W, 3) uint8`, of the session's size.

        Raises:
            ValueError: If the frame has another size.
        """

        self._start_frame(image)
        row_of = {tracker_id: row for row, tracker_id in enumerate(self.memories)}
        results = FrameResults(len(row_of), self.size_hw)
        with inference():
            for batch in self._batches():
                memories = self._join_memories(batch)
                found = Propagated(*self.objects.propagate(*self.image_features(image), *memories))
                results.add([row_of[i] for i in batch], found.logits, found.presence, found.iou)
                for k, tracker_id in enumerate(batch):
                    memory, row = self.memories[tracker_id], slice(k, k + 1)
                    memory.features[self.frame], memory.pointers[self.frame] = found.maps[row], found.pointers[row]
                    self._logits[tracker_id], self._raw_logits[tracker_id] = found.logits[row], found.raw_logits[row]
            if self._next is not None and row_of:
                self.image_features(self._next)
        self._next = None
        return tracked_detections(np.array(list(row_of), np.int64), *results.wait())

    def prompt(self, detections: sv.Detections) -> sv.Detections:
        """Add or correct objects on the frame of the last `step`, and return those that have a mask.

        Args:
            detections: Prompts with `tracker_id`. An object with a known id is corrected, any other is added.
        """

        assert self._image is not None, "prompt was called before step"
        assert detections.tracker_id is not None
        ids = detections.tracker_id.tolist()
        prompt_masks = [mask_prompt(detections, i, self.options.prompt) for i in range(len(ids))]
        results = FrameResults(len(ids), self.size_hw)
        with inference():
            if ids:
                features = self.image_features(self._image)
            for tracker_id in ids:
                self.memories.setdefault(tracker_id, ObjectMemory())
            masked = [i for i, mask in enumerate(prompt_masks) if mask is not None]
            for rows in chunks(masked, self.chunk):
                masks = np.stack([np.asarray(prompt_masks[i], bool) for i in rows])
                values = to_mask_input(masks, self.model.image_size, self.model.device)
                self._store_prompted(ids, rows, self.objects.use_masks(features, values), results)
            for rows, points, labels in self._group_points(detections, prompt_masks):
                decoded = self._decode_points([ids[i] for i in rows], points, labels)
                for k, i in enumerate(rows):
                    self._logits[ids[i]] = decoded[0][k : k + 1]
                self._store_prompted(ids, rows, decoded, results)
        found, confidence, scores = results.wait()
        for i in masked:
            found[i] = prompt_masks[i]
        return tracked_detections(detections.tracker_id, found, confidence, scores)

    def _group_points(
        self, detections: sv.Detections, prompt_masks: list[NDArray[np.bool_] | None]
    ) -> Iterator[tuple[list[int], NDArray[np.float32], NDArray[np.int32]]]:
        """Yield rows whose boxes and clicks can be decoded together, with their points and labels."""
        assert detections.tracker_id is not None
        groups: dict[tuple[int, ...], list[int]] = {}
        points, labels = {}, {}
        for i, tracker_id in enumerate(detections.tracker_id.tolist()):
            if prompt_masks[i] is None:
                points[i], labels[i] = to_points(detections, i, self.size_hw, self.model.image_size)
                key: tuple[int, ...] = (len(points[i]),)
                if tracker_id in self._logits:  # it was propagated to this frame, and is corrected
                    self.memories[tracker_id].forget_frame(self.frame)
                    key = (len(points[i]), *self._memory_key(tracker_id))
                groups.setdefault(key, []).append(i)
        for members in groups.values():
            for rows in chunks(members, self.chunk):
                yield rows, np.stack([points[i] for i in rows]), np.stack([labels[i] for i in rows])

    def _decode_points(
        self, ids: list[int], points: NDArray[np.float32], labels: NDArray[np.int32]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Decode boxes and clicks of objects; with memory and logits if they were propagated to this frame.

        Args:
            ids: Ids of the objects.
            points: See `ObjectModel.decode`.
            labels: See `ObjectModel.decode`.
        """
        import torch

        assert self._image is not None
        features, device = self.image_features(self._image), self.model.device
        logits = None
        if ids[0] in self._logits:
            fused = self.objects.attend(features[-1], self._join_memories(ids))
            logits = torch.cat([self._logits[i] for i in ids]).clamp(-32, 32)
        else:
            fused = self.objects.without_memory(features[-1], len(ids))
        inputs = to_device(torch.from_numpy(points), device), to_device(torch.from_numpy(labels), device)
        multimask = self.model._use_multimask(logits is None, {"point_labels": inputs[1]})
        return self.objects.decode(features, fused, multimask, inputs, logits)

    def _store_prompted(
        self, ids: list[int], rows: list[int], decoded: tuple[Tensor, ...], results: FrameResults
    ) -> None:
        """Store what was decoded for prompts as the memory of this frame, and add it to the results."""
        assert self._image is not None
        logits, _, iou, presence, pointers = decoded
        maps = self.objects.remember(self.image_features(self._image)[-1], logits, presence, prompted=True)
        for k, i in enumerate(rows):
            memory = self.memories[ids[i]]
            memory.forget_frame(self.frame)
            # These are kept for long, so they should not keep those of other objects.
            memory.prompted[self.frame] = (maps[k : k + 1].clone(), pointers[k : k + 1].clone())
        results.add(rows, logits, presence, iou)

    def reset_memory(self, tracker_id: int) -> None:
        """Drop the memory of an object, except that of its prompts."""
        memory = self.memories[tracker_id]
        memory.features.clear()
        memory.pointers.clear()
        self._logits.pop(tracker_id, None)

    def remove(self, tracker_id: int) -> None:
        """Remove an object and free its memory."""
        self.memories.pop(tracker_id, None)
        self._forget_object(tracker_id)

    def close(self) -> None:
        """Release all resources."""
        super().close()
        self.memories.clear()
        self._encoded, self._next = [], None

    def _batches(self) -> Iterator[list[int]]:
        """Drop what memory attention no longer reaches, and yield chunks of ids whose objects can be batched."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for tracker_id, memory in self.memories.items():
            num_pointers = self.model.max_obj_ptrs_in_encoder
            memory.prune(self.frame, self.model.num_maskmem, num_pointers, self.options.max_prompts)
            groups.setdefault(self._memory_key(tracker_id), []).append(tracker_id)
        for ids in groups.values():
            yield from chunks(ids, self.chunk)

    def _memory_key(self, tracker_id: int) -> tuple[int, ...]:
        """Return what objects must have in common to be batched: the number of their maps."""
        memory = self.memories[tracker_id]
        pointers = () if self._pads else (len(memory.prompted) + len(memory.pointers),)
        return (len(memory.prompted) + len(memory.features), *pointers)

    def _join_memories(self, ids: list[int]) -> Memories:
        """Batch the memories of objects with equal numbers of maps."""
        import torch

        current, oldest = self.frame, self.model.num_maskmem - 1
        maps, pointers, numbers = [], [], []
        for memory in (self.memories[i] for i in ids):
            recent = sorted(memory.features.items())
            maps.append([*(encoded for encoded, _ in memory.prompted.values()), *(encoded for _, encoded in recent)])
            by_age = [(current - frame, pointer) for frame, (_, pointer) in memory.prompted.items()]
            by_age += [(current - frame, pointer) for frame, pointer in sorted(memory.pointers.items(), reverse=True)]
            pointers.append([pointer for _, pointer in by_age])
            indices = [oldest] * len(memory.prompted) + [current - frame - 1 for frame, _ in recent]
            numbers.append((indices, [age for age, _ in by_age]))
        joined_maps, joined_pointers = join_memories(maps, pointers)
        most = joined_pointers.shape[1]
        table = np.zeros((len(ids), len(maps[0]) + most + 1), np.int64)
        for row, (indices, ages) in zip(table, numbers, strict=True):
            row[: len(indices) + len(ages)] = indices + ages
            row[-1] = len(indices) * self.objects.map_tokens + len(ages) * self.objects.pointer_tokens
        if all(len(own) == most for own in pointers):
            table = np.ascontiguousarray(table[:, :-1])
        return Memories(joined_maps, joined_pointers, to_device(torch.from_numpy(table), self.model.device))


def chunks(items: list[int], size: int) -> Iterator[list[int]]:
    """Split a list into parts of at most a size.

    >>> list(chunks([4, 5, 6], 2))
    [[4, 5], [6]]
    """
    for start in range(0, len(items), size):
        yield items[start : start + size]


class Sam2Tracker(MemoryTracker):
    """Propagate masks through a video with SAM 2.1.

    Args:
        segmenter: Segmenter of the pipeline. If it is a `Sam2` with the same weights, size, device, precision and back
            end, model and image features are shared.
        checkpoint: See `segmenters.sam2.Sam2`.
        size: See `segmenters.sam2.Sam2`.
        sha256: See `segmenters.sam2.Sam2`.
        chunk: Largest number of objects per forward pass; None for 64 on CUDA and 1 on a CPU, where batches are no
            faster.
        **options: See `trackers.options.TrackerOptions`.

    Attributes:
        chunk: As above.
        encode: See `segmenters.sam2.Sam2`.
        objects: What the model computes for objects.
        pads: Whether objects with different numbers of pointers are batched.
        encodes_ahead: Whether sessions encode frames ahead.

    Raises:
        CheckpointError: If the weights are missing, damaged, or of another model.
        ConfigError: If an option is not allowed, or the package `sam2` is not installed.
    """

    def __init__(
        self,
        segmenter: Any = None,
        checkpoint: str | None = None,
        size: Size = "tiny",
        sha256: str | None = None,
        chunk: int | None = None,
        **options: Any,
    ) -> None:
        check_int("tracker.chunk", chunk, 1, optional=True)
        parsed = TrackerOptions(**options)
        shared = find_shared(segmenter, Sam2, model_identity(parsed, checkpoint, size))
        super().__init__(parsed, shared)
        if shared is None:
            import_package("sam2", "tracker=sam2", INSTEAD)
            model_options = {option.name: getattr(parsed, option.name) for option in fields(ModelOptions)}
            shared = Sam2(checkpoint, size, sha256, **model_options)
        self.model, self.encode = shared.model, shared.encode
        speed_up_memory(self.model, parsed.precision)
        self.pads = memory_takes_lengths(self.model)
        # As in `build_sam2_video_predictor`; the image predictor ignores it.
        self.model.binarize_mask_from_pts_for_mem_enc = True
        self.objects = ObjectModel(self.model)
        self.encodes_ahead = self.model.device.type == "cuda"
        self.chunk = chunk or (64 if self.encodes_ahead else 1)

    @classmethod
    def hub_file(cls, settings: Mapping[str, Any]) -> HubFile:
        """Return the file on the hub that settings name; see `segmenters.sam2.sam2_hub_file`."""
        return sam2_hub_file(settings)

    def open(self, size_hw: tuple[int, int]) -> Sam2Session:
        """Open a session for a video of frames of one size."""
        return Sam2Session(self, size_hw)
