"""SAM 2, EdgeTAM and the SAM 3 tracker over transformers' video models, used on single pictures."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from grounded_sam.checkpoints import BUILTIN, builtin, cached_or_fetched, find_folder, load_weights, pick_device
from grounded_sam.errors import CheckpointError
from grounded_sam.segmenters.prompts import Decoded, PromptedSegmenter, Prompts
from grounded_sam.speed.backends import Backend, Where
from grounded_sam.speed.levers import Precision, check_precision, sent
from grounded_sam.speed.sam2 import speed_up_encoder

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
    from transformers import AutoConfig, AutoModel, Sam2VideoModel, Sam3TrackerVideoModel

    if str(checkpoint).startswith("builtin:"):
        path = builtin(str(checkpoint).removeprefix("builtin:"), "sam2")
        model: Any = Sam2VideoModel(config_of(BUILTIN.parent / "sam2.yaml"))
        model.load_state_dict(rename(load_weights(path)))
        return model.eval()
    folder = find_folder(checkpoint, "sam2")

    def fetch(local_files_only: bool) -> Any:
        safe = {"local_files_only": local_files_only, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(folder, **safe)
        # SAM 3's files hold its detector as well.
        kind = Sam3TrackerVideoModel if config.model_type in ("sam3", "sam3_video") else AutoModel
        return kind.from_pretrained(folder, dtype=torch.float32, **safe)

    model = cached_or_fetched(folder, fetch)
    if not hasattr(model, "_encode_new_memory"):
        raise CheckpointError(
            f"{checkpoint} is a {type(model).__name__}, which does not track; expected SAM 2, EdgeTAM or SAM 3 of video"
        )
    return model.eval()


def load_processor(checkpoint: str, model: Any) -> Any:
    """The image processor of a checkpoint; for `builtin:NAME` SAM 2's own at the model's size."""
    from transformers import AutoImageProcessor
    from transformers.models.sam2 import Sam2ImageProcessor

    if str(checkpoint).startswith("builtin:"):
        side = model.config.image_size
        return Sam2ImageProcessor(size={"height": side, "width": side})
    folder = find_folder(checkpoint, "sam2")

    def fetch(local_files_only: bool) -> Any:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=local_files_only, trust_remote_code=False)

    return cached_or_fetched(folder, fetch)


class Sam2Hf(PromptedSegmenter):
    """Boxes, clicks and masks to masks with SAM 2, EdgeTAM or the SAM 3 tracker of transformers.

    The model is the one for videos, which has all that pictures need, so that `trackers.sam2_hf` can share
    it and the image features. Masks are those of `Sam2Model` on the same weights.

    Args:
        checkpoint: a hub id or folder of a `Sam2VideoModel`, `EdgeTamVideoModel` or `Sam3TrackerVideoModel`,
            or `builtin:NAME`.
        device: `auto`, `cpu`, `cuda`...
        multimask: decode three masks per prompt and keep the best; pays for single clicks.
        chunk: prompts decoded at once, fewer on large images.
        fill_holes: pixels of the largest hole in a mask to fill; 0 fills none.
        drop_specks: pixels of the largest separate speck to drop; 0 drops none.
        rounds: how often each prompt is decoded; from the second time on with the box and logits of its mask.
        precision: `exact` with levers that change no result, `balanced` and `fast` with more bfloat16; see `speed`.
        compile: let `torch.compile` have the image encoder; pays for many pictures.
        backend: what runs the image backbone on the CPU: `torch`, or `openvino`, `onnxruntime` (extras).
        exports: a folder of conversions for such a back end; null: converted anew in each run.

    Raises:
        CheckpointError: if the weights cannot be had, or are of another model.
    """

    def __init__(
        self,
        checkpoint: str = "facebook/sam2.1-hiera-tiny",
        device: str = "auto",
        multimask: bool = False,
        chunk: int = 64,
        fill_holes: int = 0,
        drop_specks: int = 0,
        rounds: int = 1,
        precision: Precision = "exact",
        compile: bool = False,
        backend: Backend = "torch",
        exports: str | None = None,
    ) -> None:
        check_precision(precision, compile, "segmenter")
        super().__init__(multimask, chunk, fill_holes, drop_specks, rounds)
        self.precision, self.backend = precision, backend
        where = Where(backend, exports)
        where.check(pick_device(device), "segmenter")
        #: Which weights these are and where, for a tracker that may share them.
        self.source = (checkpoint, pick_device(device), precision, backend)
        self.model = load_model(checkpoint).to(self.source[1])
        speed_up_encoder(self.model, precision, compile, where)
        self.processor = load_processor(checkpoint, self.model)
        self._features: Callable[[NDArray[np.uint8]], list[Tensor]] = self._own
        self._maps: list[Tensor] | None = None
        self._size_hw = (0, 0)

    def over(self, features: Callable[[NDArray[np.uint8]], list[Tensor]]) -> Sam2Hf:
        """This segmenter on images that someone else encodes; for a tracker, which has to see every frame.

        Args:
            features: an image to the `fpn_hidden_states` of the model's `get_image_features` for it.
        """
        other = copy(self)
        other.embeddings = None
        other._features = features
        return other

    def _own(self, image: NDArray[np.uint8]) -> list[Tensor]:
        pixels = sent(self.processor(images=image, return_tensors="pt").pixel_values, self.model.device)
        return list(self.model.get_image_features(pixels, return_dict=True).fpn_hidden_states)

    def _encode(self, image: NDArray[np.uint8]) -> None:
        import torch

        with torch.inference_mode():
            *fine, last = self._features(image)
            flat = [*fine, last + self.model.no_memory_embedding]
            sizes = self.model.backbone_feature_sizes
            self._maps = [f.permute(1, 2, 0).reshape(1, -1, *s) for f, s in zip(flat, sizes, strict=True)]
        self._size_hw = (image.shape[0], image.shape[1])

    def _state(self) -> tuple[Any, tuple[str, ...]]:
        return self, ("_maps", "_size_hw")

    def _forget(self) -> None:
        self._maps = None

    def _decode(self, prompts: Prompts) -> Decoded:
        import torch

        model, n = self.model, len(prompts.rows)
        side, place = model.prompt_encoder.input_image_size, model.device
        height, width = self._size_hw
        scale = np.array([side / width, side / height], np.float32)
        points, labels = np.empty((n, 0, 2), np.float32), np.empty((n, 0), np.int64)
        if prompts.boxes is not None:  # as corners, in front of the clicks, as sam2 does it
            points, labels = prompts.boxes.reshape(n, 2, 2) * scale, np.tile(np.array([2, 3]), (n, 1))
        if prompts.points is not None and prompts.labels is not None:
            points = np.concatenate([points, prompts.points * scale], 1)
            labels = np.concatenate([labels, prompts.labels], 1)
        if not points.shape[1]:
            points, labels = np.zeros((n, 1, 2), np.float32), np.full((n, 1), -1)
        out, predicted, low_logits = [], [], []
        alike = prompts.masks is None and prompts.logits is None
        with torch.inference_mode():
            # Masks make the dense embeddings differ from prompt to prompt, and the decoder takes one for all.
            for rows in [slice(None)] if alike else [slice(i, i + 1) for i in range(n)]:
                masks = None
                if prompts.masks is not None:
                    given = torch.from_numpy(prompts.masks[rows])[:, None].float().to(place)
                    low = model.prompt_encoder.mask_input_size
                    masks = torch.nn.functional.interpolate(given, low, mode="area") * 20 - 10
                elif prompts.logits is not None:
                    masks = torch.from_numpy(prompts.logits[rows])[:, None].to(place)
                sparse, dense = model.prompt_encoder(
                    input_points=torch.from_numpy(points[rows])[None].to(place),
                    input_labels=torch.from_numpy(labels[rows])[None].to(place),
                    input_boxes=None,
                    input_masks=masks,
                )
                assert self._maps is not None
                logits, ious, _, _ = model.mask_decoder(
                    image_embeddings=self._maps[-1],
                    image_positional_embeddings=model.get_image_wide_positional_embeddings(),
                    sparse_prompt_embeddings=sparse,
                    dense_prompt_embeddings=dense,
                    multimask_output=self.multimask,
                    high_resolution_features=self._maps[:-1],
                )  # (1, n, k, h, w), (1, n, k)
                sized = torch.nn.functional.interpolate(logits[0].float(), self._size_hw, mode="bilinear")
                out.append((sized > 0).cpu().numpy())
                predicted.append(ious[0].float().cpu().numpy())
                low_logits.append(logits[0].float().cpu().numpy())
        return np.concatenate(out), np.concatenate(predicted), np.concatenate(low_logits)
