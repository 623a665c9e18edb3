"""Load the video models of transformers: SAM 2, EdgeTAM and the tracker of SAM 3."""

from __future__ import annotations

from typing import Any

from grounded_sam.errors import CheckpointError
from grounded_sam.weights.loading import (
    BUILTIN_DIR,
    builtin_path,
    find_folder,
    from_cache_or_hub,
    load_weights,
)
from grounded_sam.weights.sam2_conversion import rename_weights, video_config


def load_video_model(checkpoint: str) -> Any:
    """Load a video model of transformers, in evaluation mode.

    Args:
        checkpoint: Hub id, local folder, or `builtin:NAME`, whose weights are converted from the format of sam2.

    Raises:
        CheckpointError: If the checkpoint is missing, or its model cannot track.
    """
    import torch
    from transformers import AutoConfig, AutoModel, Sam2VideoModel, Sam3TrackerVideoModel

    if str(checkpoint).startswith("builtin:"):
        path = builtin_path(str(checkpoint).removeprefix("builtin:"), "sam2")
        model: Any = Sam2VideoModel(video_config(BUILTIN_DIR.parent / "sam2.yaml"))
        model.load_state_dict(rename_weights(load_weights(path)))
        return model.eval()
    folder = find_folder(checkpoint, "sam2")

    def load(local_files_only: bool) -> Any:
        safe = {"local_files_only": local_files_only, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(folder, **safe)
        # The checkpoints of SAM 3 also contain its detector, which AutoModel would load.
        model_class = Sam3TrackerVideoModel if config.model_type in ("sam3", "sam3_video") else AutoModel
        return model_class.from_pretrained(folder, dtype=torch.float32, **safe)

    model = from_cache_or_hub(folder, load)
    if not hasattr(model, "_encode_new_memory"):
        raise CheckpointError(
            f"{checkpoint} is a {type(model).__name__}, which cannot track; expected a video model of SAM 2, EdgeTAM "
            "or SAM 3"
        )
    return model.eval()


def load_image_processor(checkpoint: str, model: Any) -> Any:
    """Load the image processor of a checkpoint; for `builtin:NAME`, that of SAM 2 at the size of the model.

    Args:
        checkpoint: As for `load_video_model`.
        model: Model that `load_video_model` returned for it.

    Raises:
        CheckpointError: If the checkpoint is missing.
    """
    from transformers import AutoImageProcessor
    from transformers.models.sam2 import Sam2ImageProcessor

    if str(checkpoint).startswith("builtin:"):
        side = model.config.image_size
        return Sam2ImageProcessor(size={"height": side, "width": side})
    folder = find_folder(checkpoint, "sam2")

    def load(local_files_only: bool) -> Any:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=local_files_only, trust_remote_code=False)

    return from_cache_or_hub(folder, load)
