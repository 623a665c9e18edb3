"""Tracking with the memory of SAM 2 (Ravi et al. 2024), with the package `sam2` of its authors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.acceleration.options import ModelOptions
from grounded_sam.acceleration.sam2 import speed_up_memory
from grounded_sam.checks import check_int
from grounded_sam.segmenters.options import model_identity
from grounded_sam.segmenters.sam2 import ImageFeatures, Sam2, Size, sam2_hub_file
from grounded_sam.structures.detections import tracked_detections
from grounded_sam.trackers.base import MemorySession, MemoryTracker, find_shared
from grounded_sam.trackers.options import TrackerOptions
from grounded_sam.trackers.prompting import mask_prompt, oldest_dispensable, to_mask_input, to_pixels, to_points
from grounded_sam.weights.hub import HubFile

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


@dataclass(frozen=True)
class FrameFeatures:
    """Image features of a frame, expanded for n objects.

    Attributes:
        flat: Features `(hw, n, C)` of each level, from fine to coarse.
        positions: Positional encodings of the same shapes.
        sizes: Height and width of each level.
        fine: Feature maps `(n, C, h, w)` of all levels but the coarsest.
    """

    flat: list[Tensor]
    positions: list[Tensor]
    sizes: list[tuple[int, int]]
    fine: list[Tensor]

    def to_map(self, flat: Tensor) -> Tensor:
        """Reshape features `(hw, n, C)` of the coarsest level to `(n, C, h, w)`."""
        return flat.permute(1, 2, 0).view(flat.shape[1], flat.shape[2], *self.sizes[-1])


class Sam2Session(MemorySession):
    """Track the objects of one video with SAM 2; of earlier frames only the memories of the objects are kept.

    Masks equal those of `SAM2VideoPredictor.propagate_in_video` with the same weights and the post-processing of
    `build_sam2_video_predictor`.

    Args:
        tracker: The tracker that opens the session.
        size_hw: Height and width of the frames in pixels.

    Attributes:
        memories: Memory of each object by id, in the order in which they were added.
    """

    def __init__(self, tracker: Sam2Tracker, size_hw: tuple[int, int]) -> None:
        super().__init__(tracker, tracker.model.sam_mask_decoder, size_hw)
        self.chunk = tracker.chunk
        self.memories: dict[int, ObjectMemory] = {}
        self._encoded: tuple[NDArray[np.uint8], ImageFeatures] | None = None  # the image encoded last
        self._memory_positions: Tensor | None = None  # positional encoding of mask memory, (hw, 1, 64)

    def image_features(self, image: NDArray[np.uint8]) -> ImageFeatures:
        """Return the output of `SAM2Base.forward_image` for an image; the last image is encoded once."""
        import torch

        if self._encoded is None or image is not self._encoded[0]:
            pixels = to_pixels(image, self.model.image_size, self.model.device)
            with torch.inference_mode():
                self._encoded = image, self.model.forward_image(pixels)
        return self._encoded[1]

    def step(self, image: NDArray[np.uint8]) -> sv.Detections:
        """Advance to the next frame and return the visible objects, in the order in which they were added.

        Args:
            image: RGB, `(H, W, 3) uint8`, of the session's size.

        Raises:
            ValueError: If the frame has another size.
        """
        import torch

        self._start_frame(image)
        none = (np.empty(0, np.int64), np.empty((0, *self.size_hw), bool), np.empty(0), np.empty(0))
        parts: list[tuple[NDArray[Any], ...]] = [none]
        with torch.inference_mode():
            for batch in self._batches():
                memories = [self.memories[i] for i in batch]
                features = self._frame_features(len(batch))
                fused = self._attend_to_memory(memories, features)
                multimask = self.model._use_multimask(False, None)
                output = self.model._forward_sam_heads(fused, None, None, features.fine, multimask)
                _, _, ious, low_res, high_res, pointers, presence = output
                encoded = self._encode_memory(features, high_res, presence, prompted=False)
                for k, (tracker_id, memory) in enumerate(zip(batch, memories, strict=True)):
                    memory.features[self.frame] = encoded[k : k + 1]
                    memory.pointers[self.frame] = pointers[k : k + 1]
                    self._logits[tracker_id] = low_res[k : k + 1]
                    self._raw_logits[tracker_id] = self._decoder_output[0][k : k + 1, ious[k].argmax()][:, None]
                parts.append(self._results(batch, low_res, presence, ious.max(1).values))
        ids, masks, confidence, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
        rank = {tracker_id: n for n, tracker_id in enumerate(self.memories)}
        order = np.argsort([rank[i] for i in ids.tolist()]).astype(np.intp)
        return tracked_detections(ids[order], masks[order], confidence[order], scores[order])

    def prompt(self, detections: sv.Detections) -> sv.Detections:
        """Add or correct objects on the frame of the last `step`, and return those that have a mask.

        Args:
            detections: Prompts with `tracker_id`. An object with a known id is corrected, any other is added.
        """
        import torch

        assert detections.tracker_id is not None
        masks, confidence, scores = [], [], []
        with torch.inference_mode():
            for i, tracker_id in enumerate(detections.tracker_id.tolist()):
                memory = self.memories.setdefault(tracker_id, ObjectMemory())
                mask = mask_prompt(detections, i, self.options.prompt)
                features = self._frame_features(1)
                if mask is not None:
                    values = to_mask_input(mask, self.model.image_size, self.model.device)
                    coarse = features.to_map(features.flat[-1])
                    output = self.model._use_mask_as_output(coarse, features.fine, values)
                else:
                    output = self._decode_points(tracker_id, detections, i, features)
                _, _, iou, low_res, _, pointer, presence = output
                side = self.model.image_size
                high_res = torch.nn.functional.interpolate(low_res, (side, side), mode="bilinear", align_corners=False)
                encoded = self._encode_memory(features, high_res, presence, prompted=True)
                memory.forget_frame(self.frame)
                memory.prompted[self.frame] = (encoded, pointer)
                _, decoded_masks, present, score = self._results([tracker_id], low_res, presence, iou.max(1).values)
                masks.append(decoded_masks[0] if mask is None else mask)
                confidence.append(present[0])
                scores.append(score[0])
        stacked = np.array(masks, bool).reshape(-1, *self.size_hw)
        return tracked_detections(detections.tracker_id, stacked, np.array(confidence), np.array(scores))

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
        self._encoded = self._memory_positions = None

    def _batches(self) -> Iterator[list[int]]:
        """Yield chunks of ids whose objects can be batched: they have equal numbers of memories and pointers."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for tracker_id, memory in self.memories.items():
            num_pointers = self.model.max_obj_ptrs_in_encoder
            memory.prune(self.frame, self.model.num_maskmem, num_pointers, self.options.max_prompts)
            key = (len(memory.prompted), len(memory.features), len(memory.pointers))
            groups.setdefault(key, []).append(tracker_id)
        for ids in groups.values():
            for start in range(0, len(ids), self.chunk):
                yield ids[start : start + self.chunk]

    def _frame_features(self, n: int) -> FrameFeatures:
        """Return the image features of the current frame for n objects."""
        assert self._image is not None, "prompt was called before step"
        maps = self.image_features(self._image)
        _, flat, positions, sizes = self.model._prepare_backbone_features(maps)
        return FrameFeatures(
            flat=[f.expand(-1, n, -1) for f in flat],
            positions=[p.expand(-1, n, -1) for p in positions],
            sizes=sizes,
            fine=[m.expand(n, -1, -1, -1) for m in maps["backbone_fpn"][-len(sizes) : -1]],
        )

    def _attend_to_memory(self, memories: list[ObjectMemory], features: FrameFeatures) -> Tensor:
        """Fuse the features of the frame with the memories of n objects, `(n, C, h, w)`.

        Equals `SAM2Base._prepare_memory_conditioned_features`, for several objects with equal numbers of memories.
        """
        import torch
        from sam2.modeling.sam2_utils import get_1d_sine_pe

        model, current = self.model, self.frame
        banks, positions, pointers, ages = [], [], [], []
        for memory in memories:
            bank = [(model.num_maskmem - 1, encoded) for encoded, _ in memory.prompted.values()]
            bank += [(current - frame - 1, encoded) for frame, encoded in sorted(memory.features.items())]
            banks.append(torch.cat([encoded.flatten(2) for _, encoded in bank], 2))
            positions.append(torch.cat([self._memory_positions + model.maskmem_tpos_enc[age] for age, _ in bank]))
            by_age = [(current - frame, pointer) for frame, (_, pointer) in memory.prompted.items()]
            by_age += [(current - frame, pointer) for frame, pointer in sorted(memory.pointers.items(), reverse=True)]
            pointers.append(torch.cat([pointer for _, pointer in by_age]))
            ages.append([age for age, _ in by_age])
        n, count, width = len(memories), len(ages[0]), model.hidden_dim
        relative = torch.tensor(ages, device=model.device).T / (model.max_obj_ptrs_in_encoder - 1)  # (count, n)
        encoding = get_1d_sine_pe(relative.reshape(-1), dim=width)
        times = model.obj_ptr_tpos_proj(encoding).view(count, n, model.mem_dim)
        splits = width // model.mem_dim  # a pointer is split into tokens as wide as the memory
        tokens = torch.stack(pointers, 1).reshape(count, n, splits, model.mem_dim).permute(0, 2, 1, 3).flatten(0, 1)
        fused = model.memory_attention(
            curr=features.flat[-1:],
            curr_pos=features.positions[-1:],
            memory=torch.cat([torch.cat(banks).permute(2, 0, 1), tokens]),
            memory_pos=torch.cat([torch.cat(positions, 1), times.repeat_interleave(splits, 0)]),
            num_obj_ptr_tokens=len(tokens),
        )
        return features.to_map(fused)

    def _decode_points(
        self, tracker_id: int, detections: sv.Detections, i: int, features: FrameFeatures
    ) -> tuple[Any, ...]:
        """Decode the box and clicks of an object; with memory and logits if it was propagated to this frame."""
        import torch

        points, labels = to_points(detections, i, self.size_hw, self.model.image_size)
        inputs = {
            "point_coords": torch.from_numpy(points)[None].to(self.model.device),
            "point_labels": torch.from_numpy(labels)[None].to(self.model.device),
        }
        memory, previous = self.memories[tracker_id], self._logits.get(tracker_id)
        if previous is None:
            fused = features.to_map(features.flat[-1] + self.model.no_mem_embed)
        else:
            memory.forget_frame(self.frame)
            fused = self._attend_to_memory([memory], features)
            previous = previous.clamp(-32, 32)
        multimask = self.model._use_multimask(previous is None, inputs)
        output: tuple[Any, ...] = self.model._forward_sam_heads(fused, inputs, previous, features.fine, multimask)
        self._logits[tracker_id] = output[3]
        return output

    def _encode_memory(self, features: FrameFeatures, high_res: Tensor, presence: Tensor, prompted: bool) -> Tensor:
        """Encode mask logits at the model's input size as mask memory `(n, 64, h, w) bfloat16`."""
        import torch

        encoded, positions = self.model._encode_new_memory(features.flat, features.sizes, high_res, presence, prompted)
        if self._memory_positions is None:
            self._memory_positions = positions[-1][:1].flatten(2).permute(2, 0, 1).clone()
        return encoded.to(torch.bfloat16)

    def _results(
        self, ids: list[int], low_res: Tensor, presence: Tensor, iou: Tensor
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]:
        """Return ids, masks of the frame's size, confidence that the object is present, and predicted IoU."""
        confidence = presence[:, 0].float().sigmoid().cpu().numpy()
        return np.array(ids, np.int64), self._to_masks(low_res), confidence, iou.float().cpu().numpy()


class Sam2Tracker(MemoryTracker):
    """Propagate masks through a video with SAM 2.1.

    Args:
        segmenter: Segmenter of the pipeline. If it is a `Sam2` with the same weights, size, device, precision and back
            end, model and image features are shared.
        checkpoint: See `segmenters.sam2.Sam2`.
        size: See `segmenters.sam2.Sam2`.
        sha256: See `segmenters.sam2.Sam2`.
        chunk: Largest number of objects per forward pass; None for 16 on CUDA and 1 on a CPU, where batches are no
            faster.
        **options: See `trackers.options.TrackerOptions`.

    Raises:
        CheckpointError: If the weights are missing, damaged, or of another model.
        ConfigError: If an option is not allowed.
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
            model_options = {option.name: getattr(parsed, option.name) for option in fields(ModelOptions)}
            self.model = Sam2(checkpoint, size, sha256, **model_options).model
        else:
            self.model = shared.model
        speed_up_memory(self.model, parsed.precision)
        # As in `build_sam2_video_predictor`; the image predictor ignores it.
        self.model.binarize_mask_from_pts_for_mem_enc = True
        self.chunk = chunk or (16 if self.model.device.type == "cuda" else 1)

    @classmethod
    def hub_file(cls, settings: Mapping[str, Any]) -> HubFile:
        """Return the file on the hub that settings name; see `segmenters.sam2.sam2_hub_file`."""
        return sam2_hub_file(settings)

    def open(self, size_hw: tuple[int, int]) -> Sam2Session:
        """Open a session for a video of frames of one size."""
        return Sam2Session(self, size_hw)
