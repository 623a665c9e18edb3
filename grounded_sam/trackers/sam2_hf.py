"""Tracking with the memory of SAM 2, EdgeTAM or the tracker of SAM 3, with the video models of transformers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.acceleration.patching import inference
from grounded_sam.acceleration.sam2 import speed_up_encoder, speed_up_memory
from grounded_sam.segmenters.options import model_identity
from grounded_sam.segmenters.sam2_hf import Sam2Hf
from grounded_sam.structures.detections import tracked_detections
from grounded_sam.trackers.base import MemorySession, MemoryTracker, find_shared
from grounded_sam.trackers.options import TrackerOptions
from grounded_sam.trackers.prompting import mask_prompt, oldest_dispensable, to_mask_input, to_pixels, to_points
from grounded_sam.weights.sam2_video import load_image_processor, load_video_model

if TYPE_CHECKING:
    from torch import Tensor


class Sam2HfSession(MemorySession):
    """Track the objects of one video with a model of transformers.

    With the same weights, masks equal those of `trackers.sam2.Sam2Session`. In streaming mode transformers keeps every
    frame, mask and memory forever; here everything that memory attention cannot reach is dropped.

    Args:
        tracker: The tracker that opens the session.
        size_hw: Height and width of the frames in pixels.

    Attributes:
        state: Session of transformers, which holds the memories.
        ids: Ids of the objects, in the order in which they were added.
    """

    def __init__(self, tracker: Sam2HfTracker, size_hw: tuple[int, int]) -> None:
        super().__init__(tracker, size_hw)
        self._decoder_output: Any = None
        self._hook = self.model.mask_decoder.register_forward_hook(self._keep_decoder_output)
        self._mean_std = tracker.mean_std
        module = sys.modules[type(self.model).__module__]
        session_class = getattr(module, type(self.model).__name__.replace("Model", "InferenceSession"))
        device = self.model.device
        self.state: Any = session_class(
            video_height=size_hw[0],
            video_width=size_hw[1],
            inference_device=device,
            inference_state_device=device,
            video_storage_device=device,
            dtype=self.model.dtype,
        )
        self.ids: list[int] = []
        self._memory_positions: Any = None  # positional encoding of mask memory

    def _keep_decoder_output(self, _module: Any, _inputs: Any, output: Any) -> None:
        """Keep the mask logits, which the model overwrites for objects that it predicts to be absent."""
        self._decoder_output = output

    def _pixels(self, image: NDArray[np.uint8]) -> Tensor:
        return to_pixels(image, self._side, self.model.device, *self._mean_std)

    def image_features(self, image: NDArray[np.uint8]) -> list[Tensor]:
        """Return the feature maps of an image, from fine to coarse; the current frame is encoded once."""
        with inference():
            if image is not self._image:
                return list(self.model.get_image_features(self._pixels(image), return_dict=True).fpn_hidden_states)
            self._add_frame()
            return list(self.model._prepare_vision_features(self.state, self.frame, 1)[0])

    def step(self, image: NDArray[np.uint8]) -> sv.Detections:
        """Advance to the next frame and return the visible objects; see `Sam2Session.step`."""
        self._start_frame(image)
        self.state.processed_frames = {}
        self.state.cache.clear_all()
        outputs, scores = {}, []
        with inference():
            for tracker_id in self.ids:
                self._prune(tracker_id)
                outputs[tracker_id] = self._propagate(tracker_id, is_init_cond_frame=False)
                self._logits[tracker_id] = outputs[tracker_id]["pred_masks"]
                logits, ious = self._decoder_output[0], self._decoder_output[1]  # (1, 1, k, h, w), (1, 1, k)
                self._raw_logits[tracker_id] = logits[:, 0, ious.argmax()][:, None]
                scores.append(float(ious.max()))
            for tracker_id, output in outputs.items():
                self._encode_memory(tracker_id, output, prompted=False)
            masks, confidence = self._results(list(outputs.values()))
        return tracked_detections(np.array(self.ids, np.int64), masks, confidence, np.array(scores))

    def prompt(self, detections: sv.Detections) -> sv.Detections:
        """Add or correct objects on the frame of the last `step`; see `Sam2Session.prompt`."""
        assert detections.tracker_id is not None
        outputs, scores, prompt_masks = [], [], []
        with inference():
            for i, tracker_id in enumerate(detections.tracker_id.tolist()):
                if tracker_id not in self.ids:
                    self.ids.append(tracker_id)
                    empty: dict[str, dict[int, Any]] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
                    self.state.output_dict_per_obj[tracker_id] = empty
                self.state.output_dict_per_obj[tracker_id]["non_cond_frame_outputs"].pop(self.frame, None)
                mask = mask_prompt(detections, i, self.options.prompt)
                if mask is not None:
                    values = to_mask_input(mask[None], self._side, self.model.device)
                    with self._single_mask():
                        output = self._propagate(tracker_id, is_init_cond_frame=True, mask_inputs=values)
                    score = 1.0
                else:
                    output = self._decode_points(tracker_id, detections, i)
                    score = float(self._decoder_output[1].max())
                self._encode_memory(tracker_id, output, prompted=True)
                outputs.append(output)
                scores.append(score)
                prompt_masks.append(mask)
            masks, confidence = self._results(outputs)
        for i, mask in enumerate(prompt_masks):
            if mask is not None:
                masks[i] = mask
        return tracked_detections(detections.tracker_id, masks, confidence, np.array(scores))

    def reset_memory(self, tracker_id: int) -> None:
        """Drop the memory of an object, except that of its prompts."""
        self.state.output_dict_per_obj[tracker_id]["non_cond_frame_outputs"].clear()
        self._logits.pop(tracker_id, None)

    def remove(self, tracker_id: int) -> None:
        """Remove an object and free its memory."""
        if tracker_id in self.ids:
            self.ids.remove(tracker_id)
            del self.state.output_dict_per_obj[tracker_id]
            self._forget_object(tracker_id)

    def close(self) -> None:
        """Release all resources."""
        super().close()
        self._hook.remove()
        self._decoder_output = None
        self.state.reset_inference_session()
        self.state.processed_frames = {}
        self._memory_positions = None

    @property
    def _side(self) -> int:
        """Height and width of the model's input in pixels."""
        side = self.model.image_size
        return int(side if isinstance(side, int) else side[0])

    @property
    def _is_edgetam(self) -> bool:
        """Whether the model has the spatial perceiver of EdgeTAM, which encodes memories itself."""
        return hasattr(self.model, "spatial_perceiver")

    def _add_frame(self) -> None:
        """Add the current frame to the session of transformers, if it is not in it yet."""
        if self.frame not in self.state.processed_frames:
            assert self._image is not None
            self.state.add_new_frame(self._pixels(self._image), self.frame)

    def _propagate(self, tracker_id: int, is_init_cond_frame: bool, **prompts: Any) -> dict[str, Tensor]:
        """Run the model for one object on the current frame, whose image is encoded by the first call only."""
        self._add_frame()
        kwargs: dict[str, Any] = {"point_inputs": None, "mask_inputs": None, **prompts}
        if self._is_edgetam:  # `_encode_memory` does it, for all models alike
            kwargs["run_mem_encoder"] = False
        output: dict[str, Tensor] = self.model._run_single_frame_inference(
            inference_session=self.state,
            obj_idx=tracker_id,
            frame_idx=self.frame,
            batch_size=1,
            is_init_cond_frame=is_init_cond_frame,
            reverse=False,
            streaming=True,
            **kwargs,
        )
        return output

    def _decode_points(self, tracker_id: int, detections: sv.Detections, i: int) -> dict[str, Tensor]:
        """Decode the box and clicks of an object; with memory and logits if it was propagated to this frame."""
        import torch

        points, labels = to_points(detections, i, self.size_hw, self._side)
        inputs = {
            "point_coords": torch.from_numpy(points)[None, None].to(self.model.device),
            "point_labels": torch.from_numpy(labels)[None, None].to(self.model.device),
        }
        previous = self._logits.get(tracker_id)
        output = self._propagate(
            tracker_id,
            is_init_cond_frame=previous is None,
            point_inputs=inputs,
            prev_sam_mask_logits=None if previous is None else previous.clamp(-32, 32),
        )
        self._logits[tracker_id] = output["pred_masks"]
        return output

    @contextmanager
    def _single_mask(self) -> Iterator[None]:
        """Take the object pointer of a mask prompt from the single-mask token, as sam2 does.

        Transformers sets `multimask_output` there, so its pointers differ from those of sam2.
        """
        forward = self.model._single_frame_forward
        self.model._single_frame_forward = partial(forward, multimask_output=False)
        try:
            yield
        finally:
            del self.model._single_frame_forward

    def _encode_memory(self, tracker_id: int, output: dict[str, Tensor], prompted: bool) -> None:
        """Encode the low-resolution mask of an object, as sam2 does, and store it as its memory of this frame."""
        import torch

        high_res = torch.nn.functional.interpolate(output["pred_masks"], (self._side, self._side), mode="bilinear")
        features, positions = self.model._encode_new_memory(
            current_vision_feats=self.state.cache.get_vision_features(self.frame)["vision_feats"][-1],
            pred_masks_high_res=high_res,
            object_score_logits=output["object_score_logits"],
            is_mask_from_pts=prompted,
        )
        if self._memory_positions is None or self._is_edgetam:
            self._memory_positions = positions  # of other models they are the same in all frames
        memory = {
            "object_pointer": output["object_pointer"],
            "maskmem_features": features,
            "maskmem_pos_enc": self._memory_positions,
        }
        self.state.store_output(tracker_id, self.frame, output_value=memory, is_conditioning_frame=prompted)

    def _prune(self, tracker_id: int) -> None:
        """Drop what memory attention cannot reach from this frame on, and surplus prompted frames."""
        memory = self.state.output_dict_per_obj[tracker_id]
        recent, prompted = memory["non_cond_frame_outputs"], memory["cond_frame_outputs"]
        for frame in list(recent):
            if frame <= self.frame - self.model.config.max_object_pointers_in_encoder:
                del recent[frame]
            elif frame <= self.frame - self.model.num_maskmem:
                recent[frame].pop("maskmem_features", None)
        while len(prompted) > self.options.max_prompts:
            del prompted[oldest_dispensable(list(prompted), self.options.max_prompts)]

    def _results(self, outputs: list[dict[str, Tensor]]) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
        """Return masks of the frame's size, and confidence that the object is present."""
        masks = np.zeros((len(outputs), *self.size_hw), bool)
        for mask, output in zip(masks, outputs, strict=True):
            mask[:] = self._to_masks(output["pred_masks"])[0]
        return masks, np.array([float(output["object_score_logits"].sigmoid()) for output in outputs], np.float32)


class Sam2HfTracker(MemoryTracker):
    """Propagate masks through a video with SAM 2, EdgeTAM or the tracker of SAM 3 of transformers.

    Args:
        segmenter: Segmenter of the pipeline. If it is a `Sam2Hf` with the same checkpoint, device, precision and back
            end, model and image features are shared.
        checkpoint: Hub id or local folder of a `Sam2VideoModel`, `EdgeTamVideoModel` or `Sam3TrackerVideoModel`, or
            `builtin:NAME`.
        **options: See `trackers.options.TrackerOptions`.

    Attributes:
        mean_std: Mean and standard deviation of each channel that the model expects pixels to be normalized with.

    Raises:
        CheckpointError: If the weights are missing, or of a model that cannot track.
        ConfigError: If an option is not allowed.
    """

    def __init__(self, segmenter: Any = None, checkpoint: str = "facebook/sam2.1-hiera-tiny", **options: Any) -> None:
        parsed = TrackerOptions(**options)
        shared = find_shared(segmenter, Sam2Hf, model_identity(parsed, checkpoint))
        super().__init__(parsed, shared)
        if shared is None:
            self.model = load_video_model(checkpoint).to(parsed.torch_device)
            speed_up_encoder(self.model, parsed.precision, parsed.compile, parsed.backend_settings)
            processor = load_image_processor(checkpoint, self.model)
        else:
            self.model, processor = shared.model, shared.processor
        speed_up_memory(self.model, parsed.precision)
        self.mean_std = (np.array(processor.image_mean, np.float32), np.array(processor.image_std, np.float32))

    def open(self, size_hw: tuple[int, int]) -> Sam2HfSession:
        """Open a session for a video of frames of one size."""
        return Sam2HfSession(self, size_hw)
