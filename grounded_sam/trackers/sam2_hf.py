"""SAM 2, EdgeTAM and SAM 3 video memory one frame at a time, over transformers' video models."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.acceleration.backends import Backend, BackendSettings
from grounded_sam.acceleration.patching import Precision, check_precision
from grounded_sam.acceleration.sam2 import speed_up_encoder, speed_up_memory
from grounded_sam.errors import ConfigError
from grounded_sam.segmenters.sam2_hf import Sam2Hf
from grounded_sam.structures.detections import tracked_detections
from grounded_sam.trackers.prompting import mask_prompt, to_mask_input, to_pixels, to_points
from grounded_sam.weights.loading import pick_device
from grounded_sam.weights.sam2_video import load_image_processor, load_video_model

if TYPE_CHECKING:
    from torch import Tensor


class Sam2HfSession:
    """One video on its way through a transformers model, whose own session is pruned after every frame.

    See `trackers.sam2.Sam2Session`: on the same weights the masks are the same. Transformers' streaming
    keeps every frame, every mask and every memory for good; here what memory attention cannot reach goes.
    """

    def __init__(self, tracker: Sam2HfTracker, size_hw: tuple[int, int]) -> None:
        self.model, self.size_hw = tracker.model, size_hw
        self.prompt_with, self.max_prompts = tracker.prompt, tracker.max_prompts
        self._normal = tracker.normal
        session = getattr(
            sys.modules[type(self.model).__module__], type(self.model).__name__.replace("Model", "InferenceSession")
        )
        place = self.model.device
        self.state: Any = session(
            video_height=size_hw[0],
            video_width=size_hw[1],
            inference_device=place,
            inference_state_device=place,
            video_storage_device=place,
            dtype=self.model.dtype,
        )
        self.ids: list[int] = []
        self.frame = -1
        self._image: NDArray[np.uint8] | None = None
        self._logits: dict[int, Tensor] = {}  # of the current frame, of objects propagated to it
        self._place: Any = None
        self._guesses: dict[int, Tensor] = {}  # the same, also of objects held to be absent
        self._decoded: Any = None
        self._hook = self.model.mask_decoder.register_forward_hook(self._catch)
        #: The segmenter of the same model on this session's image features; None if it has another model.
        self.segmenter = None if tracker.shared is None else tracker.shared.over(self.features)

    def _catch(self, _module: Any, _inputs: Any, out: Any) -> None:
        self._decoded = out

    def _pixels(self, image: NDArray[np.uint8]) -> Tensor:
        return to_pixels(image, self._side(), self.model.device, *self._normal)

    def features(self, image: NDArray[np.uint8]) -> list[Tensor]:
        """The features of an image; of the current frame encoded once."""
        import torch

        with torch.inference_mode():
            if image is not self._image:
                pixels = self._pixels(image)
                return list(self.model.get_image_features(pixels, return_dict=True).fpn_hidden_states)
            self._see()
            return list(self.model._prepare_vision_features(self.state, self.frame, 1)[0])

    def step(self, image: NDArray[np.uint8]) -> sv.Detections:
        """Go one frame on; see `Sam2Session.step`."""
        import torch

        if image.shape[:2] != self.size_hw:
            height, width = self.size_hw
            raise ValueError(f"expected a frame of {width}x{height} px, got {image.shape[1]}x{image.shape[0]} px")
        self.frame += 1
        self._image = image
        self.state.processed_frames = {}
        self.state.cache.clear_all()
        self._logits.clear()
        self._guesses.clear()
        outs, scores = {}, []
        with torch.inference_mode():
            for tracker_id in self.ids:
                self._prune(tracker_id)
                outs[tracker_id] = self._run(tracker_id, is_init_cond_frame=False)
                self._logits[tracker_id] = outs[tracker_id]["pred_masks"]
                masks_, ious = self._decoded[0], self._decoded[1]  # (1, 1, k, h, w), (1, 1, k)
                self._guesses[tracker_id] = masks_[:, 0, ious.argmax()][:, None]
                scores.append(float(ious.max()))
            for tracker_id, out in outs.items():
                self._memorise(tracker_id, out, prompted=False)
            masks, there = self._out(list(outs.values()))
        return tracked_detections(np.array(self.ids, np.int64), masks, there, np.array(scores))

    def prompt(self, found: sv.Detections) -> sv.Detections:
        """Add or correct objects on the frame of the last `step`; see `Sam2Session.prompt`."""
        import torch

        assert found.tracker_id is not None
        side = self._side()
        outs, scores, given = [], [], []
        with torch.inference_mode():
            for i, tracker_id in enumerate(found.tracker_id.tolist()):
                if tracker_id not in self.ids:
                    self.ids.append(tracker_id)
                    self.state.output_dict_per_obj[tracker_id] = {
                        "cond_frame_outputs": {},
                        "non_cond_frame_outputs": {},
                    }
                self.state.output_dict_per_obj[tracker_id]["non_cond_frame_outputs"].pop(self.frame, None)
                mask = mask_prompt(found, i, self.prompt_with)
                if mask is not None:
                    with self._one_mask():
                        at_size = to_mask_input(mask, side, self.model.device)
                        out = self._run(tracker_id, is_init_cond_frame=True, mask_inputs=at_size)
                    score = 1.0
                else:
                    points, labels = to_points(found, i, self.size_hw, side)
                    clicked = {
                        "point_coords": torch.from_numpy(points)[None, None].to(self.model.device),
                        "point_labels": torch.from_numpy(labels)[None, None].to(self.model.device),
                    }
                    before = self._logits.get(tracker_id)
                    out = self._run(
                        tracker_id,
                        is_init_cond_frame=before is None,
                        point_inputs=clicked,
                        prev_sam_mask_logits=None if before is None else before.clamp(-32, 32),
                    )
                    self._logits[tracker_id] = out["pred_masks"]
                    score = float(self._decoded[1].max())
                self._memorise(tracker_id, out, prompted=True)
                outs.append(out)
                scores.append(score)
                given.append(mask)
            masks, there = self._out(outs)
        for i, mask in enumerate(given):
            if mask is not None:
                masks[i] = mask
        return tracked_detections(found.tracker_id, masks, there, np.array(scores))

    def guess(self, ids: Sequence[int]) -> sv.Detections:
        """Where objects that the last `step` did not see would be; see `Sam2Session.guess`."""
        known = [i for i in ids if i in self._guesses]
        masks = np.zeros((len(known), *self.size_hw), bool)
        for mask, tracker_id in zip(masks, known, strict=True):
            mask[:] = self._sized(self._guesses[tracker_id])
        return tracked_detections(np.array(known, np.int64), masks, np.zeros(len(known)), np.zeros(len(known)))

    def forget(self, tracker_id: int) -> None:
        """Drop what an object left in memory since its prompts."""
        self.state.output_dict_per_obj[tracker_id]["non_cond_frame_outputs"].clear()
        self._logits.pop(tracker_id, None)

    def remove(self, tracker_id: int) -> None:
        """Forget an object altogether; it costs nothing any more."""
        if tracker_id in self.ids:
            self.ids.remove(tracker_id)
            del self.state.output_dict_per_obj[tracker_id]
            self._logits.pop(tracker_id, None)

    def close(self) -> None:
        """Let go of everything."""
        self._hook.remove()
        self.state.reset_inference_session()
        self.state.processed_frames = {}
        self._logits.clear()
        self._guesses.clear()
        self._image = self._place = self._decoded = None

    def _side(self) -> int:
        side = self.model.image_size
        return int(side if isinstance(side, int) else side[0])

    def _see(self) -> None:
        """Hand the current frame to transformers' session, once."""
        if self.frame not in self.state.processed_frames:
            assert self._image is not None
            self.state.add_new_frame(self._pixels(self._image), self.frame)

    def _run(self, tracker_id: int, is_init_cond_frame: bool, **prompts: Any) -> dict[str, Tensor]:
        """One object through the current frame, whose image is encoded the first time only."""
        self._see()
        arguments: dict[str, Any] = {"point_inputs": None, "mask_inputs": None, **prompts}
        if hasattr(self.model, "spatial_perceiver"):  # EdgeTAM would encode the memory itself
            arguments["run_mem_encoder"] = False
        out: dict[str, Tensor] = self.model._run_single_frame_inference(
            inference_session=self.state,
            obj_idx=tracker_id,
            frame_idx=self.frame,
            batch_size=1,
            is_init_cond_frame=is_init_cond_frame,
            reverse=False,
            streaming=True,
            **arguments,
        )
        return out

    @contextmanager
    def _one_mask(self) -> Iterator[None]:
        """Take a mask prompt's object pointer from the single-mask token, as sam2 does.

        Transformers leaves `multimask_output` at true there, so its pointers are others than sam2's.
        """
        forward = self.model._single_frame_forward
        self.model._single_frame_forward = partial(forward, multimask_output=False)
        try:
            yield
        finally:
            del self.model._single_frame_forward

    def _memorise(self, tracker_id: int, out: dict[str, Tensor], prompted: bool) -> None:
        """Store the frame's memory of one object, made from its mask at low resolution as sam2 does it."""
        import torch

        side = self._side()
        full = torch.nn.functional.interpolate(out["pred_masks"], (side, side), mode="bilinear")
        features, place = self.model._encode_new_memory(
            current_vision_feats=self.state.cache.get_vision_features(self.frame)["vision_feats"][-1],
            pred_masks_high_res=full,
            object_score_logits=out["object_score_logits"],
            is_mask_from_pts=prompted,
        )
        if self._place is None or hasattr(self.model, "spatial_perceiver"):
            self._place = place  # without a perceiver it is the same for all frames
        kept = {"object_pointer": out["object_pointer"], "maskmem_features": features, "maskmem_pos_enc": self._place}
        self.state.store_output(tracker_id, self.frame, output_value=kept, is_conditioning_frame=prompted)

    def _prune(self, tracker_id: int) -> None:
        """Drop what this frame and later ones cannot reach; of the prompts keep the first and the latest."""
        memory = self.state.output_dict_per_obj[tracker_id]
        recent, prompts = memory["non_cond_frame_outputs"], memory["cond_frame_outputs"]
        for frame in list(recent):
            if frame <= self.frame - self.model.config.max_object_pointers_in_encoder:
                del recent[frame]
            elif frame <= self.frame - self.model.num_maskmem:
                recent[frame].pop("maskmem_features", None)
        while len(prompts) > self.max_prompts:
            del prompts[sorted(prompts)[1 if self.max_prompts > 1 else 0]]

    def _out(self, outs: list[dict[str, Tensor]]) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
        """Masks at the video's size and confidence of presence, one object at a time."""
        masks = np.zeros((len(outs), *self.size_hw), bool)
        for mask, out in zip(masks, outs, strict=True):
            mask[:] = self._sized(out["pred_masks"])
        return masks, np.array([float(out["object_score_logits"].sigmoid()) for out in outs], np.float32)

    def _sized(self, logits: Tensor) -> NDArray[np.bool_]:
        """Logits `(1, 1, h, w)` as a mask at the video's size."""
        import torch

        sized = torch.nn.functional.interpolate(logits, self.size_hw, mode="bilinear")
        return (sized[0, 0] > 0).cpu().numpy()  # type: ignore[no-any-return]


class Sam2HfTracker:
    """Follows masks through a video with transformers' SAM 2, EdgeTAM or SAM 3 tracker.

    Args:
        segmenter: of the pipeline; if it is `Sam2Hf` of the same checkpoint, model and image features are shared.
        checkpoint: a hub id or folder of a `Sam2VideoModel`, `EdgeTamVideoModel` or `Sam3TrackerVideoModel`,
            or `builtin:NAME`.
        device: `auto`, `cpu`, `cuda`...
        prompt: what a new object is given to the model as: its `mask` or its `box`; `auto`: its mask if it has one.
        max_prompts: conditioning frames kept per object, the first and the latest ones.
        precision, compile, backend, exports: see `segmenters.sam2_hf.Sam2Hf`.

    Raises:
        CheckpointError: if the weights cannot be had, or are of a model that does not track.
    """

    def __init__(
        self,
        segmenter: Any = None,
        checkpoint: str = "facebook/sam2.1-hiera-tiny",
        device: str = "auto",
        prompt: Literal["auto", "mask", "box"] = "auto",
        max_prompts: int = 4,
        precision: Precision = "exact",
        compile: bool = False,
        backend: Backend = "torch",
        exports: str | None = None,
    ) -> None:
        if prompt not in ("auto", "mask", "box"):
            raise ConfigError(f"tracker.prompt must be auto, mask or box, got {prompt!r}")
        if isinstance(max_prompts, bool) or not isinstance(max_prompts, int) or max_prompts < 1:
            raise ConfigError(f"tracker.max_prompts must be a whole number from 1, got {max_prompts!r}")
        check_precision(precision, compile, "tracker")
        where = BackendSettings(backend, exports)
        where.check(pick_device(device), "tracker")
        source = (checkpoint, pick_device(device), precision, backend)
        self.shared = segmenter if isinstance(segmenter, Sam2Hf) and segmenter.source == source else None
        if self.shared is not None:
            self.model = self.shared.model
        else:
            self.model = load_video_model(checkpoint).to(source[1])
            speed_up_encoder(self.model, precision, compile, where)
        speed_up_memory(self.model, precision)
        processor = self.shared.processor if self.shared is not None else load_image_processor(checkpoint, self.model)
        #: Mean and deviation of the pixels that the model was trained with.
        self.normal = (np.array(processor.image_mean, np.float32), np.array(processor.image_std, np.float32))
        self.prompt, self.max_prompts = prompt, max_prompts

    def open(self, size_hw: tuple[int, int]) -> Sam2HfSession:
        """A session for one video of frames of `size_hw`."""
        return Sam2HfSession(self, size_hw)
