"""SAM 2's video memory (Ravi et al. 2024) one frame at a time, over its authors' package."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.acceleration.backends import Backend, BackendSettings
from grounded_sam.acceleration.patching import Precision, check_precision
from grounded_sam.acceleration.sam2 import speed_up_memory
from grounded_sam.errors import ConfigError
from grounded_sam.segmenters.sam2 import Sam2
from grounded_sam.structures.detections import tracked_detections
from grounded_sam.trackers.prompting import mask_prompt, to_mask_input, to_pixels, to_points
from grounded_sam.weights.loading import pick_device

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Memory:
    """What is kept of one object; frames are numbers within the session.

    `prompted` (conditioning frames) stay; of the frames after that, features of the last
    `num_maskmem - 1` and pointers of the last `max_obj_ptrs_in_encoder - 1` stay: memory attention
    reaches no further.
    """

    prompted: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # (1, 64, h, w) bfloat16, (1, C)
    features: dict[int, Tensor] = field(default_factory=dict)
    pointers: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None  # (1, 1, 4h, 4w) of the frame just run, if it was propagated to
    guess: Tensor | None = None  # the same, also if the model holds the object to be absent

    def prune(self, frame: int, features: int, pointers: int, prompts: int) -> None:
        """Drop what `frame` and later ones cannot reach; of the prompts keep the first and the latest."""
        for old in [f for f in self.features if f <= frame - features]:
            del self.features[old]
        for old in [f for f in self.pointers if f <= frame - pointers]:
            del self.pointers[old]
        while len(self.prompted) > prompts:
            del self.prompted[sorted(self.prompted)[1 if prompts > 1 else 0]]


class Sam2Session:
    """One video on its way through SAM 2: memory per object, nothing of earlier frames but that.

    `step` goes one frame on; `prompt` then adds or corrects objects on that same frame, without
    touching the others. Equal to `SAM2VideoPredictor.propagate_in_video` on the same weights, with the
    post-processing of `build_sam2_video_predictor`.
    """

    def __init__(self, tracker: Sam2Tracker, size_hw: tuple[int, int]) -> None:
        self.model, self.size_hw = tracker.model, size_hw
        self.prompt_with, self.chunk, self.max_prompts = tracker.prompt, tracker.chunk, tracker.max_prompts
        self.frame = -1
        self.memories: dict[int, Memory] = {}
        self._current: NDArray[np.uint8] | None = None
        self._image: NDArray[np.uint8] | None = None
        self._maps: dict[str, list[Tensor]] | None = None  # of the image encoder, for `_image`
        self._place: Tensor | None = None  # positional encoding of memories, (hw, 1, 64)
        self._decoded: Any = None
        self._hook = self.model.sam_mask_decoder.register_forward_hook(self._catch)
        #: The segmenter of the same model on this session's image features; None if it has another model.
        self.segmenter = None if tracker.shared is None else tracker.shared.over(self.maps)

    def _catch(self, _module: Any, _inputs: Any, out: Any) -> None:
        """Keep what the mask decoder gives before absent objects are blanked."""
        self._decoded = out

    def maps(self, image: NDArray[np.uint8]) -> dict[str, list[Tensor]]:
        """What `SAM2Base.forward_image` gives for an image; encoded once for the image last asked for."""
        import torch

        if self._maps is None or image is not self._image:
            with torch.inference_mode():
                self._maps = self.model.forward_image(to_pixels(image, self.model.image_size, self.model.device))
            self._image = image
        return self._maps

    def step(self, image: NDArray[np.uint8]) -> sv.Detections:
        """Go one frame on.

        Args:
            image: RGB, `(H, W, 3) uint8`, of the session's size.

        Returns:
            The objects that are seen, in the order of their ids' arrival: `mask`, `xyxy`,
            `tracker_id`, `confidence` (that it is there, 0 to 1) and `data["mask_score"]`; no class.
        """
        import torch

        if image.shape[:2] != self.size_hw:
            height, width = self.size_hw
            raise ValueError(f"expected a frame of {width}x{height} px, got {image.shape[1]}x{image.shape[0]} px")
        self.frame += 1
        self._current = image
        nothing = (np.empty(0, np.int64), np.empty((0, *self.size_hw), bool), np.empty(0), np.empty(0))
        parts: list[tuple[NDArray[Any], ...]] = [nothing]
        with torch.inference_mode():
            for ids in self._alike():
                memories = [self.memories[i] for i in ids]
                features, positions, sizes, high = self._look(len(ids))
                fused = self._recall(memories, features, positions, sizes)
                _, _, ious, low, full, pointers, score = self.model._forward_sam_heads(
                    fused, None, None, high, self.model._use_multimask(False, None)
                )
                kept = self._memorise(features, sizes, full, score, False)
                for k, memory in enumerate(memories):
                    memory.features[self.frame] = kept[k : k + 1]
                    memory.pointers[self.frame] = pointers[k : k + 1]
                    memory.logits = low[k : k + 1]
                    memory.guess = self._decoded[0][k : k + 1, ious[k].argmax()][:, None]
                parts.append(self._out(ids, low, score, ious.max(1).values))
        numbers, masks, there, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = {tracker_id: n for n, tracker_id in enumerate(self.memories)}
        sort = np.argsort([order[i] for i in numbers.tolist()]).astype(np.intp)
        return tracked_detections(numbers[sort], masks[sort], there[sort], scores[sort])

    def prompt(self, found: sv.Detections) -> sv.Detections:
        """Add or correct objects on the frame of the last `step`.

        Args:
            found: with `tracker_id`; an id that is known is corrected. Mask prompts need `mask`.

        Returns:
            The prompted objects that have a mask, as from `step`.
        """
        import torch

        assert found.tracker_id is not None
        masks, there, scores = [], [], []
        with torch.inference_mode():
            for i, tracker_id in enumerate(found.tracker_id.tolist()):
                memory = self.memories.setdefault(tracker_id, Memory())
                mask = mask_prompt(found, i, self.prompt_with)
                features, positions, sizes, high = self._look(1)
                if mask is not None:
                    given = to_mask_input(mask, self.model.image_size, self.model.device)
                    plain = features[-1].permute(1, 2, 0).view(1, -1, *sizes[-1])
                    _, _, iou, low, _, pointer, score = self.model._use_mask_as_output(plain, high, given)
                else:
                    low, iou, pointer, score = self._decode(memory, found, i, features, positions, sizes, high)
                side = self.model.image_size
                full = torch.nn.functional.interpolate(low, (side, side), mode="bilinear", align_corners=False)
                kept = self._memorise(features, sizes, full, score, True)
                memory.features.pop(self.frame, None)
                memory.pointers.pop(self.frame, None)
                memory.prompted[self.frame] = (kept, pointer)
                _, drawn, sure, best = self._out([tracker_id], low, score, iou.max(1).values)
                masks.append(drawn[0] if mask is None else mask)
                there.append(sure[0])
                scores.append(best[0])
        masks_out = np.array(masks, bool).reshape(-1, *self.size_hw)
        return tracked_detections(found.tracker_id, masks_out, np.array(there), np.array(scores))

    def guess(self, ids: Sequence[int]) -> sv.Detections:
        """Where objects that the last `step` did not see would be, if the model is wrong about their absence."""
        import torch

        known = [i for i in ids if i in self.memories and self.memories[i].guess is not None]
        masks = np.zeros((len(known), *self.size_hw), bool)
        for mask, tracker_id in zip(masks, known, strict=True):
            logits = self.memories[tracker_id].guess
            assert logits is not None
            sized = torch.nn.functional.interpolate(logits, self.size_hw, mode="bilinear", align_corners=False)
            mask[:] = (sized[0, 0] > 0).cpu().numpy()
        return tracked_detections(np.array(known, np.int64), masks, np.zeros(len(known)), np.zeros(len(known)))

    def forget(self, tracker_id: int) -> None:
        """Drop what an object left in memory since its prompts."""
        memory = self.memories[tracker_id]
        memory.features.clear()
        memory.pointers.clear()
        memory.logits = None

    def remove(self, tracker_id: int) -> None:
        """Forget an object altogether; it costs nothing any more."""
        self.memories.pop(tracker_id, None)

    def close(self) -> None:
        """Let go of everything."""
        self._hook.remove()
        self.memories.clear()
        self._decoded = None
        self._maps = self._image = self._current = self._place = None

    def _alike(self) -> Iterator[list[int]]:
        """Ids in chunks that can go through the model as one batch: with as many memories and pointers."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for tracker_id, memory in self.memories.items():
            memory.logits = memory.guess = None
            memory.prune(self.frame, self.model.num_maskmem, self.model.max_obj_ptrs_in_encoder, self.max_prompts)
            key = (len(memory.prompted), len(memory.features), len(memory.pointers))
            groups.setdefault(key, []).append(tracker_id)
        for ids in groups.values():
            for start in range(0, len(ids), self.chunk):
                yield ids[start : start + self.chunk]

    def _look(self, n: int) -> tuple[list[Tensor], list[Tensor], list[tuple[int, int]], list[Tensor]]:
        """Image features of the current frame for n objects: flat `(hw, n, C)`, positions, sizes, fine maps."""
        assert self._current is not None, "prompt comes after step"
        maps = self.maps(self._current)
        _, features, positions, sizes = self.model._prepare_backbone_features(maps)
        features = [f.expand(-1, n, -1) for f in features]
        positions = [p.expand(-1, n, -1) for p in positions]
        high = [m.expand(n, -1, -1, -1) for m in maps["backbone_fpn"][-len(sizes) : -1]]
        return features, positions, sizes, high

    def _recall(
        self, memories: list[Memory], features: list[Tensor], positions: list[Tensor], sizes: list[tuple[int, int]]
    ) -> Tensor:
        """Fuse the frame's features with n objects' memories, `(n, C, h, w)`.

        As `SAM2Base._prepare_memory_conditioned_features`, for several objects with as many memories.
        """
        import torch
        from sam2.modeling.sam2_utils import get_1d_sine_pe

        model, now = self.model, self.frame
        banks, places, pointers, offsets = [], [], [], []
        for memory in memories:
            bank = [(model.num_maskmem - 1, kept) for kept, _ in memory.prompted.values()]
            bank += [(now - frame - 1, kept) for frame, kept in sorted(memory.features.items())]
            banks.append(torch.cat([kept.flatten(2) for _, kept in bank], 2))
            places.append(torch.cat([self._place + model.maskmem_tpos_enc[age] for age, _ in bank]))
            ages = [(now - frame, pointer) for frame, (_, pointer) in memory.prompted.items()]
            ages += [(now - frame, pointer) for frame, pointer in sorted(memory.pointers.items(), reverse=True)]
            pointers.append(torch.cat([pointer for _, pointer in ages]))
            offsets.append([age for age, _ in ages])
        n, count, width = len(memories), len(offsets[0]), model.hidden_dim
        age = torch.tensor(offsets, device=model.device).T / (model.max_obj_ptrs_in_encoder - 1)  # (count, n)
        when = model.obj_ptr_tpos_proj(get_1d_sine_pe(age.reshape(-1), dim=width)).view(count, n, model.mem_dim)
        pieces = width // model.mem_dim  # a pointer is split into tokens of the memory's width
        tokens = torch.stack(pointers, 1).reshape(count, n, pieces, model.mem_dim).permute(0, 2, 1, 3).flatten(0, 1)
        memory_in = torch.cat([torch.cat(banks).permute(2, 0, 1), tokens])
        place_in = torch.cat([torch.cat(places, 1), when.repeat_interleave(pieces, 0)])
        fused = model.memory_attention(
            curr=features[-1:],
            curr_pos=positions[-1:],
            memory=memory_in,
            memory_pos=place_in,
            num_obj_ptr_tokens=len(tokens),
        )
        return fused.permute(1, 2, 0).view(n, width, *sizes[-1])

    def _decode(
        self,
        memory: Memory,
        found: sv.Detections,
        i: int,
        features: list[Tensor],
        positions: list[Tensor],
        sizes: list[tuple[int, int]],
        high: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Box and clicks to a mask: alone for a new object, with its memory and last logits for a known one."""
        import torch

        points, labels = to_points(found, i, self.size_hw, self.model.image_size)
        given = {
            "point_coords": torch.from_numpy(points)[None].to(self.model.device),
            "point_labels": torch.from_numpy(labels)[None].to(self.model.device),
        }
        before = memory.logits
        if before is None:
            fused = (features[-1] + self.model.no_mem_embed).permute(1, 2, 0).view(1, -1, *sizes[-1])
        else:
            memory.features.pop(self.frame, None)
            memory.pointers.pop(self.frame, None)
            fused = self._recall([memory], features, positions, sizes)
            before = before.clamp(-32, 32)
        multimask = self.model._use_multimask(before is None, given)
        _, _, iou, low, _, pointer, score = self.model._forward_sam_heads(fused, given, before, high, multimask)
        memory.logits = low
        return low, iou, pointer, score

    def _memorise(
        self, features: list[Tensor], sizes: list[tuple[int, int]], full: Tensor, score: Tensor, prompted: bool
    ) -> Tensor:
        """Masks at the model's size as memories `(n, 64, h, w) bfloat16`."""
        import torch

        kept, place = self.model._encode_new_memory(features, sizes, full, score, prompted)
        if self._place is None:
            self._place = place[-1][:1].flatten(2).permute(2, 0, 1).clone()
        return kept.to(torch.bfloat16)

    def _out(
        self, ids: list[int], low: Tensor, score: Tensor, iou: Tensor
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]:
        """Ids, masks at the video's size, confidence of presence, predicted IoU."""
        import torch

        logits = torch.nn.functional.interpolate(low, self.size_hw, mode="bilinear", align_corners=False)
        masks = (logits[:, 0] > 0).cpu().numpy()
        there = score[:, 0].float().sigmoid().cpu().numpy()
        return np.array(ids, np.int64), masks, there, iou.float().cpu().numpy()


class Sam2Tracker:
    """Follows masks through a video with SAM 2.1.

    Args:
        segmenter: the pipeline's segmenter, if there is one; where it is a `Sam2` of the same weights, its
            model is used, and images are encoded once for both.
        checkpoint, size, device, sha256, precision, compile, backend, exports: see `segmenters.sam2.Sam2`.
        prompt: what a new object is given to the model as: its `mask` or its `box`; `auto`: its mask if it has one.
        max_prompts: conditioning frames kept per object, the first and the latest ones.
        chunk: objects that go through the model at once; null: 16 on CUDA, 1 on the CPU, where a batch gains nothing.

    Raises:
        CheckpointError: if the weights cannot be had, are damaged, or are of another model.
    """

    def __init__(
        self,
        segmenter: Any = None,
        checkpoint: str | None = None,
        size: Literal["tiny", "small", "base_plus", "large"] = "tiny",
        device: str = "auto",
        prompt: Literal["auto", "mask", "box"] = "auto",
        max_prompts: int = 4,
        chunk: int | None = None,
        sha256: str | None = None,
        precision: Precision = "exact",
        compile: bool = False,
        backend: Backend = "torch",
        exports: str | None = None,
    ) -> None:
        if prompt not in ("auto", "mask", "box"):
            raise ConfigError(f"tracker.prompt must be auto, mask or box, got {prompt!r}")
        for key, value in (("max_prompts", max_prompts), ("chunk", chunk)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"tracker.{key} must be a whole number from 1, got {value!r}")
        check_precision(precision, compile, "tracker")
        BackendSettings(backend, exports).check(pick_device(device), "tracker")
        source = (checkpoint, size, pick_device(device), precision, backend)
        same = isinstance(segmenter, Sam2) and segmenter.source == source
        self.shared: Sam2 | None = segmenter if same else None
        own = {"sha256": sha256, "precision": precision, "compile": compile, "backend": backend, "exports": exports}
        self.model = (self.shared or Sam2(checkpoint, size, device, **own)).model  # type: ignore[arg-type]
        speed_up_memory(self.model, precision)
        # As `build_sam2_video_predictor` has it; the image predictor does not look at it.
        self.model.binarize_mask_from_pts_for_mem_enc = True
        self.prompt, self.max_prompts = prompt, max_prompts
        self.chunk = chunk or (16 if self.model.device.type == "cuda" else 1)

    def open(self, size_hw: tuple[int, int]) -> Sam2Session:
        """A session for one video of frames of `size_hw`."""
        return Sam2Session(self, size_hw)
