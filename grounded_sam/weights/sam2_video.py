"""SAM 2, EdgeTAM and the SAM 3 tracker over transformers' video models, used on single pictures."""

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
    """A video model of transformers: `builtin:NAME` (converted), a local folder or a hub id.

    Raises:
        CheckpointError: if it cannot be had, or has no memory to track with.
    """
    import torch
    from transformers import AutoConfig, AutoModel, Sam2VideoModel, Sam3TrackerVideoModel

    if str(checkpoint).startswith("builtin:"):
        path = builtin_path(str(checkpoint).removeprefix("builtin:"), "sam2")
        model: Any = Sam2VideoModel(video_config(BUILTIN_DIR.parent / "sam2.yaml"))
        model.load_state_dict(rename_weights(load_weights(path)))
        return model.eval()
    folder = find_folder(checkpoint, "sam2")

    def fetch(local_files_only: bool) -> Any:
        safe = {"local_files_only": local_files_only, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(folder, **safe)
        # SAM 3's files hold its detector as well.
        kind = Sam3TrackerVideoModel if config.model_type in ("sam3", "sam3_video") else AutoModel
        return kind.from_pretrained(folder, dtype=torch.float32, **safe)

    model = from_cache_or_hub(folder, fetch)
    if not hasattr(model, "_encode_new_memory"):
        raise CheckpointError(
            f"{checkpoint} is a {type(model).__name__}, which does not track; expected SAM 2, EdgeTAM or SAM 3 of video"
        )
    return model.eval()


def load_image_processor(checkpoint: str, model: Any) -> Any:
    """The image processor of a checkpoint; for `builtin:NAME` SAM 2's own at the model's size."""
    from transformers import AutoImageProcessor
    from transformers.models.sam2 import Sam2ImageProcessor

    if str(checkpoint).startswith("builtin:"):
        side = model.config.image_size
        return Sam2ImageProcessor(size={"height": side, "width": side})
    folder = find_folder(checkpoint, "sam2")

    def fetch(local_files_only: bool) -> Any:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=local_files_only, trust_remote_code=False)

    return from_cache_or_hub(folder, fetch)
