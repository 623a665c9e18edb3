"""The video model of SAM 3 (Carion et al. 2025), with transformers: text in, masks with ids out."""

from __future__ import annotations

import sys
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import supervision as sv

from grounded_sam.checks import check_int
from grounded_sam.detectors.queries import Dtype, check_model_settings, drop_negatives, phrases_of
from grounded_sam.detectors.sam3 import tokenize_phrase
from grounded_sam.errors import ConfigError
from grounded_sam.structures.detections import empty_detections, make_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import masks_to_xyxy
from grounded_sam.structures.vocabulary import Vocabulary
from grounded_sam.trackers.prompting import oldest_dispensable
from grounded_sam.weights.loading import load_checkpoint, pick_device

if TYPE_CHECKING:
    from torch import Tensor


class Sam3VideoTracker:
    """Detect and track the objects that phrases describe.

    Detection, memory and association are those of `Sam3VideoModel`. Frames are returned `hotstart_delay` (15) frames
    late: an object that the detector does not confirm in that time is removed from all of them. With the same weights,
    results equal those of `Sam3VideoModel.propagate_in_video_iterator`, with two bugs fixed: in the frame in which an
    object is removed, the other masks keep their ids, and duplicates and holes are removed without code from the hub.
    Memory use does not grow with the length of the video.

    An object of a negative phrase suppresses less confident objects whose boxes it overlaps (IoU >= 0.5). The
    confidence of an object is that of its first detection.

    Args:
        segmenter: Segmenter of the pipeline; not used.
        checkpoint: Hub id or local folder of a `Sam3VideoModel`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`...
        dtype: Type of weights and activations: `float32`, `bfloat16` or `float16`.
        max_lost_frames: Number of frames without a mask after which an object is dropped; transformers never drops one.
        max_prompts: Number of frames remembered per object in which the detector confirmed it: the first one and the
            latest.
        settings: Settings of the model, named as in `Sam3VideoConfig` of transformers, such as `new_det_thresh`, the
            lowest score of a new object (0.7).

    Raises:
        CheckpointError: If the weights are missing, or of another model.
        ConfigError: If a value is not allowed, or the model has no such setting.
    """

    def __init__(
        self,
        segmenter: Any = None,
        checkpoint: str = "facebook/sam3",
        device: str = "auto",
        dtype: Dtype = "float32",
        max_lost_frames: int = 30,
        max_prompts: int = 32,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        check_model_settings(dtype, stage="tracker")
        check_int("tracker.max_lost_frames", max_lost_frames, 0)
        check_int("tracker.max_prompts", max_prompts, 1)
        import torch
        from transformers import AutoProcessor, Sam3VideoModel
        from transformers.models.sam3_video import modeling_sam3_video

        # Otherwise transformers downloads these kernels from the hub, or does not remove duplicates and holes.
        modeling_sam3_video.cv_utils_kernel = _Kernels
        self.dtype, self.max_lost_frames, self.max_prompts = getattr(torch, dtype), max_lost_frames, max_prompts
        model, self.processor = load_checkpoint(checkpoint, ["sam3_video"], Sam3VideoModel, [AutoProcessor], self.dtype)
        self.model: Any = model.to(pick_device(device))
        _apply_settings(self.model, settings or {})

    def track_text(self, frames: Iterator[Frame], vocabulary: Vocabulary) -> Iterator[tuple[Frame, sv.Detections]]:
        """Yield every frame with its objects; see `structures.protocols.TextTracker`."""
        session = Sam3VideoSession(self, vocabulary)
        pending: deque[tuple[Frame, Any]] = deque()
        for frame in frames:
            pending.append((frame, session.step(frame)))
            if len(pending) >= self.model.hotstart_delay:
                yield session.result(*pending.popleft())
            session.prune({i for _, output in pending for i in output.obj_id_to_mask})
        while pending:
            yield session.result(*pending.popleft())


class Sam3VideoSession:
    """Track the objects of one video; the session of transformers is pruned after every frame.

    Args:
        tracker: Tracker that opens the session.
        vocabulary: Classes to look for.

    Attributes:
        state: Session of transformers.
        frame: Number of the current frame; -1 before the first `step`.
    """

    def __init__(self, tracker: Sam3VideoTracker, vocabulary: Vocabulary) -> None:
        self.model, self.processor = tracker.model, tracker.processor
        self.max_lost_frames, self.max_prompts = tracker.max_lost_frames, tracker.max_prompts
        self.vocabulary, self.frame = vocabulary, -1
        self._lost_frames: dict[int, int] = {}  # by object id, number of consecutive frames without a mask
        device = self.model.device
        session_class = _session_class()
        self.state: Any = session_class(
            inference_device=device, inference_state_device=device, video_storage_device=device, dtype=tracker.dtype
        )
        phrases, self._owners = phrases_of(vocabulary)
        for i, phrase in enumerate(phrases):
            inputs = tokenize_phrase(phrase, self.processor.tokenizer).to(device)
            self.state.prompts[i] = phrase
            self.state.prompt_input_ids[i] = inputs["input_ids"]
            self.state.prompt_attention_masks[i] = inputs["attention_mask"]

    def step(self, frame: Frame) -> Any:
        """Advance to the next frame and return the output of the model, whose objects later frames may remove."""
        self.frame += 1
        inputs = self.processor(images=frame.image, return_tensors="pt")
        self.state.processed_frames = {}
        self.state.add_new_frame(inputs["pixel_values"], self.frame)
        # The model uses only the entries of the current frame, but copies all of them in every frame.
        self.state.obj_id_to_tracker_score_frame_wise = defaultdict(dict)
        self.state.suppressed_obj_ids = defaultdict(set)
        output = self.model(self.state, frame_idx=self.frame)
        self.state.hotstart_removed_obj_ids |= output.removed_obj_ids
        prompts = dict(self.state.obj_id_to_prompt_id)
        self.state.apply_removals()
        for tracker_id, mask in output.obj_id_to_mask.items():
            visible = bool((mask > 0).any())
            self._lost_frames[tracker_id] = 0 if visible else self._lost_frames.get(tracker_id, 0) + 1
        for tracker_id in [i for i in self.state.obj_ids if self._lost_frames.get(i, 0) > self.max_lost_frames]:
            self.state.remove_object(tracker_id)
        self.state.apply_removals()
        self.state.obj_id_to_prompt_id = prompts  # frames that are not returned yet need it
        return output

    def result(self, frame: Frame, output: Any) -> tuple[Frame, sv.Detections]:
        """Convert the output of `step` to detections, without the objects that were removed since.

        Args:
            frame: The frame.
            output: Output of the model for it.

        Returns:
            The frame and its detections.
        """
        import torch

        with torch.inference_mode():
            processed = self.processor.postprocess_outputs(self.state, output, original_sizes=[list(frame.size_hw)])
        masks, ids = processed["masks"].cpu().numpy(), processed["object_ids"].numpy()
        scores = processed["scores"].float().numpy()
        owners = np.array([self._owners[self.state.obj_id_to_prompt_id[i]] for i in ids.tolist()], np.int64)
        boxes = masks_to_xyxy(masks)
        rows = (owners >= 0) & masks.any((1, 2))
        if not rows.any():
            detections = empty_detections(self.vocabulary)
            detections.mask, detections.tracker_id = np.zeros((0, *frame.size_hw), bool), np.empty(0, np.int64)
            return frame, detections
        detections = make_detections(
            boxes[rows], scores[rows], owners[rows], self.vocabulary, frame.size_hw, masks[rows]
        )
        detections.tracker_id = ids[rows]
        return frame, drop_negatives(detections, boxes[owners < 0], scores[owners < 0])

    def prune(self, pending_ids: set[int]) -> None:
        """Drop from the session of transformers what neither later frames nor pending ones need.

        Args:
            pending_ids: Ids of the objects in frames that are not returned yet.
        """
        state = self.state
        needed = pending_ids | set(state.obj_ids)
        for name in ("obj_id_to_prompt_id", "obj_id_to_score", "obj_first_frame_idx", "trk_keep_alive"):
            setattr(state, name, {i: value for i, value in getattr(state, name).items() if i in needed})
        self._lost_frames = {i: n for i, n in self._lost_frames.items() if i in needed}
        state.removed_obj_ids = state.removed_obj_ids & needed
        state.hotstart_removed_obj_ids &= needed
        # The model compares the lengths of these lists with a threshold; it does not read their entries.
        current = set(state.obj_ids)
        for name, limit in (
            ("unmatched_frame_inds", self.model.hotstart_unmatch_thresh),
            ("overlap_pair_to_frame_inds", self.model.hotstart_dup_thresh),
        ):
            frames = getattr(state, name).items()
            recent = {key: v[-limit:] for key, v in frames if set(key if isinstance(key, tuple) else (key,)) <= current}
            setattr(state, name, defaultdict(list, recent))
        for group in (state.mask_inputs_per_obj, state.frames_tracked_per_obj):
            for entries in group.values():
                entries.clear()
        for memory in state.output_dict_per_obj.values():
            self._prune(memory["non_cond_frame_outputs"], memory["cond_frame_outputs"])

    def _prune(self, recent: dict[int, Any], prompts: dict[int, Any]) -> None:
        """Drop what memory attention cannot reach from the next frame on in the memory of one object."""
        tracker = self.model.tracker_model
        for frame in list(recent):
            if frame <= self.frame + 1 - tracker.config.max_object_pointers_in_encoder:
                del recent[frame]
        while len(prompts) > self.max_prompts:
            del prompts[oldest_dispensable(list(prompts), self.max_prompts)]
        nearest = set(sorted(prompts)[-tracker.config.max_cond_frame_num :])
        for frame, entry in [*recent.items(), *prompts.items()]:
            entry.pop("high_res_masks", None)
            entry.pop("pred_masks", None)
            if frame <= self.frame + 1 - tracker.num_maskmem and frame not in nearest:
                entry.pop("maskmem_features", None)
                entry.pop("maskmem_pos_enc", None)


def _session_class() -> Any:
    """Make a session class for videos of unknown length that removes objects between frames instead of within one."""
    from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoInferenceSession

    class Session(Sam3VideoInferenceSession):  # type: ignore[misc]
        #: Limits how many object pointers the model uses; the length of the video is unknown.
        num_frames = sys.maxsize

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self._removed: list[int] = []

        def remove_object(self, obj_id: int, strict: bool = False) -> None:
            """Schedule a removal, since the model pairs its masks with `obj_ids` until the end of the frame."""
            self._removed.append(obj_id)

        def apply_removals(self) -> None:
            """Remove the scheduled objects."""
            self.obj_ids = list(self._obj_id_to_idx)
            for obj_id in self._removed:
                super().remove_object(obj_id)
            self._removed = []

    return Session


def _apply_settings(model: Any, settings: Mapping[str, Any]) -> None:
    """Set attributes of a model and of its config.

    Raises:
        ConfigError: If the model has no such setting, or a value has the wrong type or is not allowed.
    """
    config = model.config
    names = {f.name for f in fields(type(config)) if f.name in vars(model)}
    names -= {"config", "low_res_mask_size"}
    for name, value in settings.items():
        if name not in names:
            raise ConfigError(f"tracker.settings: unknown key {name!r}; the keys are {', '.join(sorted(names))}")
        default = getattr(config, name)
        fits = isinstance(value, bool) == isinstance(default, bool) and isinstance(value, int | type(default))
        if not fits:
            raise ConfigError(f"tracker.settings.{name} must be of type {type(default).__name__}, got {value!r}")
        setattr(config, name, value)
        setattr(model, name, value)
    try:
        config.validate_architecture()
    except ValueError as error:
        raise ConfigError(f"tracker.settings: {error}") from error


class _Kernels:
    """Replacements in NumPy and OpenCV for the kernels `kernels-community/cv-utils` of the hub."""

    @staticmethod
    def generic_nms(ious: Tensor, scores: Tensor, iou_threshold: float, use_iou_matrix: bool = True) -> Tensor:
        """Return the indices that greedy NMS keeps, given IoUs `(n, n)` and scores `(n,)`."""
        import torch

        matrix = ious.cpu().numpy()
        order, keep = np.argsort(-scores.float().cpu().numpy(), kind="stable"), []
        while len(order):
            keep.append(int(order[0]))
            order = order[1:][matrix[order[0], order[1:]] <= iou_threshold]
        return torch.tensor(keep, dtype=torch.int64, device=scores.device)

    @staticmethod
    def cc_2d(masks: Tensor, get_counts: bool = True) -> tuple[Tensor, Tensor]:
        """Return label and size of the connected component of each pixel of masks `(n, 1, h, w)`."""
        import cv2
        import torch

        labels = np.zeros(tuple(masks.shape), np.int32)
        counts = np.zeros_like(labels)
        for label, count, mask in zip(labels[:, 0], counts[:, 0], masks[:, 0].cpu().numpy(), strict=True):
            _, label[:], stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
            count[:] = np.where(mask > 0, stats[label, cv2.CC_STAT_AREA], 0)
        return torch.from_numpy(labels).to(masks.device), torch.from_numpy(counts).to(masks.device)
