"""SAM 2 and EdgeTAM video memory one frame at a time, over transformers' video models."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.checkpoints import BUILTIN, builtin, cached_or_fetched, find_folder, load_weights, pick_device
from grounded_sam.detections import tracked
from grounded_sam.errors import CheckpointError, ConfigError
from grounded_sam.trackers.sam2 import mask_prompt, to_mask_input, to_pixels, to_points

if TYPE_CHECKING:
    from torch import Tensor

#: Names in sam2's state dict to those of transformers' `Sam2VideoModel`, applied in this order.
RENAMES = (
    (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
    (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"^sam_mask_decoder\.", "mask_decoder."),
    (r"^sam_prompt_encoder\.", "prompt_encoder."),
    (r"pe_layer\.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
    (r"mask_downscaling\.0\.", "mask_embed.conv1."),
    (r"mask_downscaling\.1\.", "mask_embed.layer_norm1."),
    (r"mask_downscaling\.3\.", "mask_embed.conv2."),
    (r"mask_downscaling\.4\.", "mask_embed.layer_norm2."),
    (r"mask_downscaling\.6\.", "mask_embed.conv3."),
    (r"output_upscaling\.0\.", "upscale_conv1."),
    (r"output_upscaling\.1\.", "upscale_layer_norm."),
    (r"output_upscaling\.3\.", "upscale_conv2."),
    (r"(iou_prediction_head|pred_obj_score_head|obj_ptr_proj|mlps\.\d+)\.layers\.0\.", r"\1.proj_in."),
    (r"(iou_prediction_head|pred_obj_score_head|obj_ptr_proj|mlps\.\d+)\.layers\.1\.", r"\1.layers.0."),
    (r"(iou_prediction_head|pred_obj_score_head|obj_ptr_proj|mlps\.\d+)\.layers\.2\.", r"\1.proj_out."),
    (r"\.mlp\.layers\.0\.", ".mlp.proj_in."),
    (r"\.mlp\.layers\.1\.", ".mlp.proj_out."),
    (r"\.out_proj\.(weight|bias)$", r".o_proj.\1"),
    (r"^memory_encoder\.o_proj\.", "memory_encoder.projection."),
    (r"^memory_encoder\.pix_feat_proj\.", "memory_encoder.feature_projection."),
    (r"\.dwconv\.", ".depthwise_conv."),
    (r"\.pwconv(\d)\.", r".pointwise_conv\1."),
    (r"\.gamma$", ".scale"),
    (r"^memory_encoder\.fuser\.", "memory_encoder.memory_fuser."),
    (r"\.norm(\d?|_final_attn)\.", r".layer_norm\1."),
    (r"^obj_ptr_proj\.", "object_pointer_proj."),
    (r"^obj_ptr_tpos_proj\.", "temporal_positional_encoding_projection_layer."),
    (r"^maskmem_tpos_enc$", "memory_temporal_positional_encoding"),
    (r"^no_mem_embed$", "no_memory_embedding"),
    (r"^no_mem_pos_enc$", "no_memory_positional_encoding"),
    (r"^no_obj_ptr$", "no_object_pointer"),
    (r"^no_obj_embed_spatial$", "occlusion_spatial_embedding_parameter"),
)


def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of sam2's `SAM2Base` under the names of transformers' `Sam2VideoModel`."""
    import torch

    out: dict[str, Tensor] = {}
    points: dict[int, Tensor] = {}
    for name, value in weights.items():
        corner = re.fullmatch(r"sam_prompt_encoder\.point_embeddings\.(\d)\.weight", name)
        if corner:
            points[int(corner[1])] = value
            continue
        down = re.fullmatch(r"memory_encoder\.mask_downsampler\.encoder\.(\d+)\.(weight|bias)", name)
        if down:  # conv, norm, activation; and again; and one last conv
            place, part = int(down[1]), down[2]
            last = max(
                int(k.split(".")[3]) for k in weights if k.startswith("memory_encoder.mask_downsampler.encoder.")
            )
            layer = f"layers.{place // 3}.{('conv', 'layer_norm')[place % 3]}" if place < last else "final_conv"
            out[f"memory_encoder.mask_downsampler.{layer}.{part}"] = value
            continue
        new = name
        for pattern, by in RENAMES:
            new = re.sub(pattern, by, new)
        out[new] = value
    out["prompt_encoder.point_embed.weight"] = torch.cat([points[i] for i in sorted(points)])
    out["shared_image_embedding.positional_embedding"] = out["prompt_encoder.shared_embedding.positional_embedding"]
    return out


def config_of(architecture: Path) -> Any:
    """The `Sam2VideoConfig` of a model that one of sam2's YAML files describes."""
    from omegaconf import OmegaConf
    from transformers import Sam2VideoConfig

    model = OmegaConf.load(architecture).model
    trunk, neck, side = model.image_encoder.trunk, model.image_encoder.neck, model.image_size
    width, stages = neck.d_model, list(trunk.stages)
    attention, encoder = model.memory_attention, model.memory_encoder
    sizes = [[side // stride, side // stride] for stride in (4, 8, 16)]
    per_stage = [trunk.embed_dim * 2**i for i in range(len(stages))]
    return Sam2VideoConfig(
        vision_config={
            "model_type": "sam2_vision_model",
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "image_size": [side, side],
                "hidden_size": trunk.embed_dim,
                "num_attention_heads": trunk.num_heads,
                "blocks_per_stage": stages,
                "embed_dim_per_stage": per_stage,
                "num_attention_heads_per_stage": [trunk.num_heads * 2**i for i in range(len(stages))],
                "window_size_per_stage": list(trunk.get("window_spec", (8, 4, 14, 7))),
                "global_attention_blocks": list(trunk.get("global_att_blocks", (12, 16, 20))),
                "window_positional_embedding_background_size": list(
                    trunk.get("window_pos_embed_bkg_spatial_size", (14, 14))
                ),
            },
            "backbone_channel_list": per_stage[::-1],
            "backbone_feature_sizes": sizes,
            "fpn_hidden_size": width,
            "fpn_top_down_levels": list(neck.fpn_top_down_levels),
        },
        prompt_encoder_config={"hidden_size": width, "image_size": side},
        mask_decoder_config={"hidden_size": width},
        image_size=side,
        memory_attention_hidden_size=width,
        memory_attention_num_layers=attention.num_layers,
        memory_attention_feed_forward_hidden_size=attention.layer.dim_feedforward,
        memory_attention_rope_feat_sizes=[side // 16, side // 16],
        memory_encoder_hidden_size=encoder.get("in_dim", 256),
        memory_encoder_output_channels=encoder.out_dim,
        mask_downsampler_embed_dim=encoder.mask_downsampler.get("embed_dim", 256),
        memory_fuser_num_layers=encoder.fuser.num_layers,
        memory_fuser_embed_dim=encoder.fuser.layer.dim,
        memory_fuser_intermediate_dim=4 * encoder.fuser.layer.dim,
    )


def load_model(checkpoint: str) -> Any:
    """A video model of transformers: `builtin:NAME` (converted), a local folder or a hub id.

    Raises:
        CheckpointError: if it cannot be had, or has no memory to track with.
    """
    import torch
    from transformers import AutoModel, Sam2VideoModel

    if str(checkpoint).startswith("builtin:"):
        path = builtin(str(checkpoint).removeprefix("builtin:"), "sam2")
        model: Any = Sam2VideoModel(config_of(BUILTIN.parent / "sam2.yaml"))
        model.load_state_dict(rename(load_weights(path)))
        return model.eval()
    folder = find_folder(checkpoint, "sam2")

    def fetch(local_files_only: bool) -> Any:
        return AutoModel.from_pretrained(
            folder, local_files_only=local_files_only, dtype=torch.float32, trust_remote_code=False
        )

    model = cached_or_fetched(folder, fetch)
    if not hasattr(model, "_encode_new_memory"):
        raise CheckpointError(
            f"{checkpoint} is a {type(model).__name__}, which does not track; expected SAM 2 or EdgeTAM for video"
        )
    return model.eval()


class Sam2HfSession:
    """One video on its way through a transformers model, whose own session is pruned after every frame.

    See `trackers.sam2.Sam2Session`: on the same weights the masks are the same. Transformers' streaming
    keeps every frame, every mask and every memory for good; here what memory attention cannot reach goes.
    """

    #: Its image features do not fit `segmenters.sam2.Sam2`.
    segmenter = None

    def __init__(self, tracker: Sam2HfTracker, size_hw: tuple[int, int]) -> None:
        self.model, self.size_hw = tracker.model, size_hw
        self.prompt_with, self.max_prompts = tracker.prompt, tracker.max_prompts
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
        self._logits: dict[int, Tensor] = {}  # of the current frame, of objects propagated to it
        self._place: Any = None
        self._guesses: dict[int, Tensor] = {}  # the same, also of objects held to be absent
        self._decoded: Any = None
        self._hook = self.model.mask_decoder.register_forward_hook(self._catch)

    def _catch(self, _module: Any, _inputs: Any, out: Any) -> None:
        self._decoded = out

    def step(self, image: NDArray[np.uint8]) -> sv.Detections:
        """Go one frame on; see `Sam2Session.step`."""
        import torch

        if image.shape[:2] != self.size_hw:
            height, width = self.size_hw
            raise ValueError(f"expected a frame of {width}x{height} px, got {image.shape[1]}x{image.shape[0]} px")
        self.frame += 1
        self._image: NDArray[np.uint8] | None = image
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
        return tracked(np.array(self.ids, np.int64), masks, there, np.array(scores))

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
        return tracked(found.tracker_id, masks, there, np.array(scores))

    def guess(self, ids: Sequence[int]) -> sv.Detections:
        """Where objects that the last `step` did not see would be; see `Sam2Session.guess`."""
        known = [i for i in ids if i in self._guesses]
        masks = np.zeros((len(known), *self.size_hw), bool)
        for mask, tracker_id in zip(masks, known, strict=True):
            mask[:] = self._sized(self._guesses[tracker_id])
        return tracked(np.array(known, np.int64), masks, np.zeros(len(known)), np.zeros(len(known)))

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

    def _run(self, tracker_id: int, is_init_cond_frame: bool, **prompts: Any) -> dict[str, Tensor]:
        """One object through the current frame, whose image is encoded the first time only."""
        if self.frame not in self.state.processed_frames:
            assert self._image is not None
            self.state.add_new_frame(to_pixels(self._image, self._side(), self.model.device), self.frame)
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
    """Follows masks through a video with transformers' SAM 2 or EdgeTAM.

    Args:
        segmenter: of the pipeline; not used, its image features are of another model.
        checkpoint: a hub id or folder of a `Sam2VideoModel` or `EdgeTamVideoModel`, or `builtin:NAME`.
        device: `auto`, `cpu`, `cuda`...
        prompt: what a new object is given to the model as: its `mask` or its `box`.
        max_prompts: conditioning frames kept per object, the first and the latest ones.

    Raises:
        CheckpointError: if the weights cannot be had, or are of a model that does not track.
    """

    def __init__(
        self,
        segmenter: Any = None,
        checkpoint: str = "facebook/sam2.1-hiera-tiny",
        device: str = "auto",
        prompt: Literal["mask", "box"] = "mask",
        max_prompts: int = 4,
    ) -> None:
        if prompt not in ("mask", "box"):
            raise ConfigError(f"tracker.prompt must be mask or box, got {prompt!r}")
        if isinstance(max_prompts, bool) or not isinstance(max_prompts, int) or max_prompts < 1:
            raise ConfigError(f"tracker.max_prompts must be a whole number from 1, got {max_prompts!r}")
        self.model = load_model(checkpoint).to(pick_device(device))
        self.prompt, self.max_prompts = prompt, max_prompts

    def open(self, size_hw: tuple[int, int]) -> Sam2HfSession:
        """A session for one video of frames of `size_hw`."""
        return Sam2HfSession(self, size_hw)
