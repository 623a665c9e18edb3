"""Convert weights and configs of the package `sam2` to `Sam2VideoModel` of transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


#: Patterns and replacements that turn parameter names of sam2 into those of `Sam2VideoModel`, in this order.
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


def rename_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the weights of a `SAM2Base` of sam2 to those of a `Sam2VideoModel` of transformers.

    Args:
        weights: State dict of the `SAM2Base`.

    Returns:
        State dict of the `Sam2VideoModel`.
    """
    import torch

    renamed: dict[str, Tensor] = {}
    point_embeddings: dict[int, Tensor] = {}
    for name, value in weights.items():
        point_embedding = re.fullmatch(r"sam_prompt_encoder\.point_embeddings\.(\d)\.weight", name)
        if point_embedding:
            point_embeddings[int(point_embedding[1])] = value
            continue
        downsampler = re.fullmatch(r"memory_encoder\.mask_downsampler\.encoder\.(\d+)\.(weight|bias)", name)
        if downsampler:  # convolution, norm and activation, repeated, and a final convolution
            index, part = int(downsampler[1]), downsampler[2]
            prefix = "memory_encoder.mask_downsampler.encoder."
            last = max(int(key.split(".")[3]) for key in weights if key.startswith(prefix))
            layer = f"layers.{index // 3}.{('conv', 'layer_norm')[index % 3]}" if index < last else "final_conv"
            renamed[f"memory_encoder.mask_downsampler.{layer}.{part}"] = value
            continue
        new_name = name
        for pattern, replacement in RENAMES:
            new_name = re.sub(pattern, replacement, new_name)
        renamed[new_name] = value
    renamed["prompt_encoder.point_embed.weight"] = torch.cat([point_embeddings[i] for i in sorted(point_embeddings)])
    renamed["shared_image_embedding.positional_embedding"] = renamed[
        "prompt_encoder.shared_embedding.positional_embedding"
    ]
    return renamed


def video_config(architecture: Path) -> Any:
    """Convert the config of a model of sam2 to a `Sam2VideoConfig`.

    Args:
        architecture: YAML file of the sam2 package, or of the `builtin:` models.
    """
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
