"""SAM 3's own video model, over transformers: words to masks with ids, without a detector or a segmenter."""

from __future__ import annotations

import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import supervision as sv

from grounded_sam.detectors.queries import check_settings, drop_negatives, phrases_of
from grounded_sam.detectors.sam3 import tokens_of
from grounded_sam.errors import ConfigError
from grounded_sam.structures.detections import empty_detections, make_detections
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import masks_to_xyxy
from grounded_sam.structures.vocabulary import Vocabulary
from grounded_sam.weights.loading import load_checkpoint, pick_device

if TYPE_CHECKING:
    from torch import Tensor


class Sam3VideoTracker:
    """Finds in every frame what the phrases mean, and follows it with lasting ids (SAM 3, Carion et al. 2025).

    Detection, memory and their association are `Sam3VideoModel`'s: frames come `hotstart_delay` (15) frames late, since
    an object that the detector does not confirm until then was never there, and on the same weights the results are
    those of `Sam3VideoModel.propagate_in_video_iterator`, two of its faults mended: the masks of the others stay with
    their ids in the frame in which an object is taken back, and duplicates and holes go without code from the hub.
    Unlike there, what is held does not grow with the video.

    An object of a negative phrase takes the place of others that it overlaps (IoU of boxes from 0.5) and is surer of.
    The confidence of an object is that of the detection that began it.

    Args:
        segmenter: of the pipeline; not used.
        checkpoint: a hub id or a local folder of a `Sam3VideoModel`.
        device: `auto`, `cpu`, `cuda`...
        dtype: weights and computation: `float32`, `bfloat16` or `float16`.
        patience: frames without a mask before an object is dropped; with the original they are carried for ever.
        max_prompts: frames remembered of an object in which the detector confirmed it, the first and the latest.
        settings: numbers of the model, under the names of transformers' `Sam3VideoConfig`, such as `new_det_thresh`,
            the least score to begin an object (0.7).

    Raises:
        CheckpointError: if the weights cannot be had, or are of another model; ConfigError: for settings that the
            model has not.
    """

    #: It never looks at what a detector finds.
    needs_detector = False

    def __init__(
        self,
        segmenter: Any = None,
        checkpoint: str = "facebook/sam3",
        device: str = "auto",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        patience: int = 30,
        max_prompts: int = 32,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        check_settings(dtype, stage="tracker")
        for name, value, least in (("patience", patience, 0), ("max_prompts", max_prompts, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"tracker.{name} must be a whole number from {least}, got {value!r}")
        import torch
        from transformers import AutoProcessor, Sam3VideoModel
        from transformers.models.sam3_video import modeling_sam3_video

        # Else it fetches and runs code from the hub, or goes without duplicates and holes being removed.
        modeling_sam3_video.cv_utils_kernel = _Kernels
        self.dtype, self.patience, self.max_prompts = getattr(torch, dtype), patience, max_prompts
        parts = [AutoProcessor]
        model, self.processor = load_checkpoint(checkpoint, ["sam3_video"], Sam3VideoModel, parts, self.dtype)
        self.model: Any = model.to(pick_device(device))
        _set(self.model, settings or {})

    def follow(
        self, frames: Iterator[Frame], vocabulary: Vocabulary, look: Callable[[Frame], sv.Detections]
    ) -> Iterator[tuple[Frame, sv.Detections]]:
        """Every frame with its objects; `look` is not used."""
        session = Sam3VideoSession(self, vocabulary)
        waiting: deque[tuple[Frame, Any]] = deque()
        for frame in frames:
            waiting.append((frame, session.step(frame)))
            if len(waiting) >= self.model.hotstart_delay:
                yield session.result(*waiting.popleft())
            session.prune({i for _, out in waiting for i in out.obj_id_to_mask})
        while waiting:
            yield session.result(*waiting.popleft())


class Sam3VideoSession:
    """One video on its way through the model, whose own session is pruned after every frame."""

    def __init__(self, tracker: Sam3VideoTracker, vocabulary: Vocabulary) -> None:
        self.model, self.processor = tracker.model, tracker.processor
        self.patience, self.max_prompts = tracker.patience, tracker.max_prompts
        self.vocabulary, self.frame = vocabulary, -1
        self._unseen: dict[int, int] = {}  # frames in a row
        place = self.model.device
        kind = _session_kind()
        self.state: Any = kind(
            inference_device=place, inference_state_device=place, video_storage_device=place, dtype=tracker.dtype
        )
        phrases, self._owners = phrases_of(vocabulary)
        for i, phrase in enumerate(phrases):
            given = tokens_of(phrase, self.processor.tokenizer).to(place)
            self.state.prompts[i] = phrase
            self.state.prompt_input_ids[i] = given["input_ids"]
            self.state.prompt_attention_masks[i] = given["attention_mask"]

    def step(self, frame: Frame) -> Any:
        """Go one frame on; what the model makes of it, which later frames may take back."""
        self.frame += 1
        given = self.processor(images=frame.image, return_tensors="pt")
        self.state.processed_frames = {}
        self.state.add_new_frame(given["pixel_values"], self.frame)
        # Of these only the current frame is looked at, and all are copied in every one.
        self.state.obj_id_to_tracker_score_frame_wise = defaultdict(dict)
        self.state.suppressed_obj_ids = defaultdict(set)
        out = self.model(self.state, frame_idx=self.frame)
        self.state.hotstart_removed_obj_ids |= out.removed_obj_ids
        prompts = dict(self.state.obj_id_to_prompt_id)
        self.state.remove_now()
        for tracker_id, mask in out.obj_id_to_mask.items():
            there = bool((mask > 0).any())
            self._unseen[tracker_id] = 0 if there else self._unseen.get(tracker_id, 0) + 1
        for tracker_id in [i for i in self.state.obj_ids if self._unseen.get(i, 0) > self.patience]:
            self.state.remove_object(tracker_id)
        self.state.remove_now()
        self.state.obj_id_to_prompt_id = prompts  # frames that wait still ask for those of objects that are gone
        return out

    def result(self, frame: Frame, out: Any) -> tuple[Frame, sv.Detections]:
        """A frame with its objects, as far as they are known to have been there."""
        import torch

        with torch.inference_mode():
            done = self.processor.postprocess_outputs(self.state, out, original_sizes=[list(frame.size_hw)])
        masks, ids = done["masks"].cpu().numpy(), done["object_ids"].numpy()
        scores = done["scores"].float().numpy()
        owners = np.array([self._owners[self.state.obj_id_to_prompt_id[i]] for i in ids.tolist()], np.int64)
        boxes = masks_to_xyxy(masks)
        named = (owners >= 0) & masks.any((1, 2))
        if not named.any():
            found = empty_detections(self.vocabulary)
            found.mask, found.tracker_id = np.zeros((0, *frame.size_hw), bool), np.empty(0, np.int64)
            return frame, found
        size_hw = frame.size_hw
        found = make_detections(boxes[named], scores[named], owners[named], self.vocabulary, size_hw, masks[named])
        found.tracker_id = ids[named]
        return frame, drop_negatives(found, boxes[owners < 0], scores[owners < 0])

    def prune(self, waiting: set[int]) -> None:
        """Drop what neither later frames nor those that wait can reach.

        Args:
            waiting: ids in frames whose results are still to come.
        """
        state = self.state
        known = waiting | set(state.obj_ids)
        for name in ("obj_id_to_prompt_id", "obj_id_to_score", "obj_first_frame_idx", "trk_keep_alive"):
            setattr(state, name, {i: value for i, value in getattr(state, name).items() if i in known})
        self._unseen = {i: n for i, n in self._unseen.items() if i in known}
        state.removed_obj_ids = state.removed_obj_ids & known
        state.hotstart_removed_obj_ids &= known
        # Only how many there are is asked, up to a threshold.
        live, counts = set(state.obj_ids), self.model
        for name, most in (
            ("unmatched_frame_inds", counts.hotstart_unmatch_thresh),
            ("overlap_pair_to_frame_inds", counts.hotstart_dup_thresh),
        ):
            noted = getattr(state, name)
            kept = {k: v[-most:] for k, v in noted.items() if set(k if isinstance(k, tuple) else (k,)) <= live}
            setattr(state, name, defaultdict(list, kept))
        for group in (state.mask_inputs_per_obj, state.frames_tracked_per_obj):
            for noted in group.values():
                noted.clear()
        for memory in state.output_dict_per_obj.values():
            self._prune(memory["non_cond_frame_outputs"], memory["cond_frame_outputs"])

    def _prune(self, recent: dict[int, Any], prompts: dict[int, Any]) -> None:
        """Of one object's memory keep what attention will reach from the next frame on."""
        tracker = self.model.tracker_model
        for frame in list(recent):
            if frame <= self.frame + 1 - tracker.config.max_object_pointers_in_encoder:
                del recent[frame]
        while len(prompts) > self.max_prompts:
            del prompts[sorted(prompts)[1 if self.max_prompts > 1 else 0]]
        nearest = set(sorted(prompts)[-tracker.config.max_cond_frame_num :])
        for frame, kept in [*recent.items(), *prompts.items()]:
            kept.pop("high_res_masks", None)
            kept.pop("pred_masks", None)
            if frame <= self.frame + 1 - tracker.num_maskmem and frame not in nearest:
                kept.pop("maskmem_features", None)
                kept.pop("maskmem_pos_enc", None)


def _session_kind() -> Any:
    """Transformers' session for a video of unknown length, without losing count of objects inside a frame."""
    from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoInferenceSession

    class Session(Sam3VideoInferenceSession):  # type: ignore[misc]
        #: Of a video that is not over; the model would look at as many object pointers as there are frames here.
        num_frames = sys.maxsize

        def __init__(self, **places: Any) -> None:
            super().__init__(**places)
            self._leaving: list[int] = []

        def remove_object(self, obj_id: int, strict: bool = False) -> None:
            """Note that an object is to go: the model goes on to pair its masks with `obj_ids`, which must stay."""
            self._leaving.append(obj_id)

        def remove_now(self) -> None:
            """Remove what was noted."""
            self.obj_ids = list(self._obj_id_to_idx)
            for obj_id in self._leaving:
                super().remove_object(obj_id)
            self._leaving = []

    return Session


def _set(model: Any, settings: Mapping[str, Any]) -> None:
    """Give a model other thresholds.

    Raises:
        ConfigError: for a name that it has not, or a value that does not fit.
    """
    config = model.config
    known = {f.name for f in fields(type(config)) if f.name in vars(model)}
    known -= {"config", "low_res_mask_size"}
    for name, value in settings.items():
        if name not in known:
            raise ConfigError(f"tracker.settings: unknown key {name!r}; the keys are {', '.join(sorted(known))}")
        was = getattr(config, name)
        fits = isinstance(value, bool) == isinstance(was, bool) and isinstance(value, int | type(was))
        if not fits:
            raise ConfigError(f"tracker.settings.{name} must be of the kind of {was!r}, got {value!r}")
        setattr(config, name, value)
        setattr(model, name, value)
    try:
        config.validate_architecture()
    except ValueError as error:
        raise ConfigError(f"tracker.settings: {error}") from error


class _Kernels:
    """What transformers would fetch from the hub (`kernels-community/cv-utils`), in numpy and OpenCV."""

    @staticmethod
    def generic_nms(ious: Tensor, scores: Tensor, iou_threshold: float, use_iou_matrix: bool = True) -> Tensor:
        """Indices of what is kept of `(n, n)` overlaps: greedily, most confident first."""
        import torch

        overlap = ious.cpu().numpy()
        order, kept = np.argsort(-scores.float().cpu().numpy(), kind="stable"), []
        while len(order):
            kept.append(int(order[0]))
            order = order[1:][overlap[order[0], order[1:]] <= iou_threshold]
        return torch.tensor(kept, dtype=torch.int64, device=scores.device)

    @staticmethod
    def cc_2d(masks: Tensor, get_counts: bool = True) -> tuple[Tensor, Tensor]:
        """Of masks `(n, 1, h, w)` the number of the piece that each pixel belongs to, and the pixels of that piece."""
        import cv2
        import torch

        labels = np.zeros(tuple(masks.shape), np.int32)
        counts = np.zeros_like(labels)
        for label, count, mask in zip(labels[:, 0], counts[:, 0], masks[:, 0].cpu().numpy(), strict=True):
            _, label[:], stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
            count[:] = np.where(mask > 0, stats[label, cv2.CC_STAT_AREA], 0)
        place = masks.device
        return torch.from_numpy(labels).to(place), torch.from_numpy(counts).to(place)
