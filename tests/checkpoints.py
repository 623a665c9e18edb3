"""Checkpoints of the real classes with random weights, saved as a user would have them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertTokenizerFast,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
)

SPECIAL = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
WORDS = (
    "a", "car", "taxi", "wheel", "truck", "van", "window", "parking", "entrance", "sign", "flag",
    "shirt", "red", "circle", "dog", "cat", "toy", "the",
)  # fmt: skip


def tokenizer(size: int = 2000) -> BertTokenizerFast:
    """Return a BERT tokenizer with some words, all letters as tokens, and the special tokens at BERT's ids."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = [*WORDS, *letters, *(f"##{c}" for c in letters), "##ing", "##van", "-", "'", ","]
    vocabulary = dict(SPECIAL)
    vocabulary |= {piece: 1100 + i for i, piece in enumerate(dict.fromkeys(pieces))}
    taken = set(vocabulary.values())
    vocabulary |= {f"[unused{i}]": i for i in range(size) if i not in taken}
    return BertTokenizerFast(vocab=vocabulary, do_lower_case=True, model_max_length=512)


SMALL = {
    "backbone_config": {
        "model_type": "swin",
        "image_size": 64,
        "embed_dim": 16,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 2, 2],
        "window_size": 4,
        "out_indices": [2, 3, 4],
    },
    "d_model": 32,
    "num_queries": 30,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_n_points": 2,
    "decoder_n_points": 2,
}


def grounding_dino(folder: Path, full: bool = False, mm: bool = False, max_text_len: int = 256, seed: int = 0) -> Path:
    """Save a Grounding DINO or MM-Grounding-DINO with random weights, of real size (Swin-T, BERT-base) or small."""
    torch.manual_seed(seed)
    words = tokenizer(30522 if full else 2000)
    text = {"model_type": "bert", "vocab_size": len(words)}
    if not full:
        text |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    kind, make = (
        (MMGroundingDinoConfig, MMGroundingDinoForObjectDetection)
        if mm
        else (GroundingDinoConfig, GroundingDinoForObjectDetection)
    )
    sizes = {} if full else SMALL
    model = make(kind(text_config=text, max_text_len=max_text_len, **sizes)).eval()
    with torch.no_grad():  # initial weights nearly ignore the text
        for name, weight in model.named_parameters():
            if name.endswith(("vision_param", "text_param")):
                weight.fill_(0.5)
            elif "bbox_embed" in name or name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
                weight.normal_(0, 0.05)  # initialized to zero, which makes all boxes equal
    model.save_pretrained(folder)
    size = {} if full else {"size": {"shortest_edge": 96, "longest_edge": 160}}
    GroundingDinoProcessor(GroundingDinoImageProcessor(**size), words).save_pretrained(folder)
    return folder


def sam(path: Path) -> Path:
    """Save SAM vit_b with random weights as a `.pth` file."""
    from segment_anything import sam_model_registry

    torch.manual_seed(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(sam_model_registry["vit_b"]().state_dict(), path)
    return path


def sam2(path: Path, config: str = "sam2.1_hiera_t.yaml") -> Path:
    """Save SAM 2.1 hiera-tiny with random weights as a `.pt` file in the format of the official ones."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from grounded_sam.hydra_state import preserve_hydra_state

    with preserve_hydra_state():
        import sam2 as package

        torch.manual_seed(2)
        cfg = OmegaConf.load(Path(package.__file__).parent / "configs" / "sam2.1" / config)
        model = instantiate(cfg.model)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict()}, path)
    return path


def owlv2(folder: Path, full: bool = False, seed: int = 0) -> Path:
    """Save an OWLv2 with random weights, of the size of owlv2-base-patch16-ensemble or small."""
    from transformers import (
        CLIPTokenizerFast,
        Owlv2Config,
        Owlv2ForObjectDetection,
        Owlv2ImageProcessor,
        Owlv2Processor,
    )

    torch.manual_seed(seed)
    text = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 16}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 96, "patch_size": 16}
    words = clip_tokenizer(CLIPTokenizerFast, CLIP_WORDS if full else None)
    text |= {"eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id, "pad_token_id": 0}
    side = 960 if full else 96
    config = (
        Owlv2Config(vision_config={"image_size": side})
        if full
        else Owlv2Config(text_config=text, vision_config=vision, projection_dim=32)
    )
    model = Owlv2ForObjectDetection(config).eval()
    with torch.no_grad():  # initial heads give all boxes one size and all classes one score
        for head in (model.box_head, model.class_head, model.objectness_head):
            for weight in head.parameters():
                weight.normal_(0, 0.05 if full else 0.3)
    model.save_pretrained(folder)
    size = {"height": side, "width": side}
    Owlv2Processor(Owlv2ImageProcessor(size=size), words).save_pretrained(folder)
    return folder


#: Size of CLIP's vocabulary.
CLIP_WORDS = 49408


def clip_tokenizer(kind: type, size: int | None = None) -> object:
    """Return a CLIP tokenizer of single letters; with `size`, padded to that many tokens, the delimiters last."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.-' "
    pieces = ["!", *letters, *(f"{c}</w>" for c in letters)]
    pieces += [f"[unused{i}]" for i in range(len(pieces), (size or 0) - 2)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return kind(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], pad_token="!", model_max_length=16)


def omdet_turbo(folder: Path, full: bool = False, seed: int = 0) -> Path:
    """Save an OmDet-Turbo with random weights, of the size of omdet-turbo-swin-tiny-hf or small.

    The real one has timm's Swin-T as its backbone; without timm it is that of transformers, of the same size.
    """
    from transformers import (
        CLIPTokenizerFast,
        DetrImageProcessor,
        OmDetTurboConfig,
        OmDetTurboForObjectDetection,
        OmDetTurboProcessor,
    )

    torch.manual_seed(seed)
    words = clip_tokenizer(CLIPTokenizerFast, CLIP_WORDS if full else None)
    words.model_max_length = 77
    text = {"model_type": "clip_text_model", "vocab_size": 600, "hidden_size": 32, "intermediate_size": 64}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 77, "projection_dim": 32}
    text |= {"eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id, "pad_token_id": 0}
    backbone = {"model_type": "swin", "image_size": 96, "embed_dim": 16, "depths": [1, 1, 1, 1], "window_size": 4}
    backbone |= {"num_heads": [1, 2, 2, 2], "out_indices": [2, 3, 4]}
    own = {"model_type": "swin", "image_size": 640, "out_indices": [2, 3, 4]}  # the rest is Swin-T
    real = {} if find_spec("timm") else {"backbone_config": own, "apply_layernorm_after_vision_backbone": False}
    small = {
        "text_config": text,
        "backbone_config": backbone,
        "image_size": 96,
        "apply_layernorm_after_vision_backbone": False,  # only for backbones of timm, which are channels-last
        "encoder_hidden_dim": 16,
        "decoder_hidden_dim": 16,
        "encoder_in_channels": [32, 64, 128],
        "vision_features_channels": [16, 16, 16],
        "encoder_dim_feedforward": 64,
        "decoder_dim_feedforward": 64,
        "class_embed_dim": 32,
        "text_projection_in_dim": 32,
        "text_projection_out_dim": 32,
        "task_encoder_hidden_dim": 64,
        "num_queries": 20,
        "decoder_num_layers": 2,
    }
    config = OmDetTurboConfig(**(real if full else small), disable_custom_kernels=True)
    model = OmDetTurboForObjectDetection(config).eval()
    model.save_pretrained(folder)
    side = 640 if full else 96
    images = DetrImageProcessor(size={"height": side, "width": side}, do_pad=False)
    OmDetTurboProcessor(images, words).save_pretrained(folder)
    return folder


def sam2_hf(folder: Path) -> Path:
    """Save SAM 2.1 hiera-tiny of transformers with random weights."""
    import sam2 as package
    from transformers import Sam2VideoModel
    from transformers.models.sam2 import Sam2ImageProcessor

    from grounded_sam.weights.sam2_conversion import video_config

    torch.manual_seed(2)
    yaml = Path(package.__file__).parent / "configs" / "sam2.1" / "sam2.1_hiera_t.yaml"
    Sam2VideoModel(video_config(yaml)).eval().save_pretrained(folder)
    Sam2ImageProcessor().save_pretrained(folder)
    return folder


def sam3_tracker(folder: Path, full: bool = False, seed: int = 0) -> Path:
    """Save SAM 3's tracker with random weights, of real size or with a small image encoder."""
    from transformers import Sam3ImageProcessor, Sam3TrackerVideoConfig, Sam3TrackerVideoModel

    torch.manual_seed(seed)
    side, grid = (1008, 72) if full else (224, 16)
    backbone = {"model_type": "sam3_vit_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    backbone |= {"num_attention_heads": 2, "image_size": side, "patch_size": 14, "window_size": 8}
    backbone |= {"global_attn_indexes": [1], "pretrain_image_size": 112}
    sizes = [[grid * scale, grid * scale] for scale in (4, 2, 1)]
    vision = {"model_type": "sam3_vision_model", "backbone_feature_sizes": sizes, "backbone_config": backbone}
    small = {
        "vision_config": vision,
        "prompt_encoder_config": {"image_size": side},
        "image_size": side,
        "memory_attention_num_layers": 1,
        "memory_attention_rope_feat_sizes": [grid, grid],
    }
    config = Sam3TrackerVideoConfig(**({} if full else small))
    Sam3TrackerVideoModel(config).eval().save_pretrained(folder)
    Sam3ImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    return folder


def edgetam(folder: Path, full: bool = False, seed: int = 0) -> Path:
    """Save EdgeTAM with random weights, of real size or for images of a quarter of the side.

    The real one has timm's RepViT-M1 as its image encoder; the small one, and without timm both, have SAM 2's Hiera-T.
    """
    from transformers import EdgeTamVideoConfig, EdgeTamVideoModel
    from transformers.models.sam2 import Sam2ImageProcessor

    torch.manual_seed(seed)
    side, grid = (1024, 64) if full else (256, 16)
    sizes = [[grid * scale, grid * scale] for scale in (4, 2, 1)]
    vision: dict[str, object] = {"backbone_feature_sizes": sizes, "image_size": side}
    if full and find_spec("timm"):
        options = {"features_only": True, "in_chans": 3, "out_indices": [0, 1, 2, 3]}
        backbone = {"architecture": "repvit_m1.dist_in1k", "num_classes": 1000, "model_args": options}
        backbone["model_type"] = "timm_wrapper"
        vision = {"model_type": "edgetam_vision_model", "backbone_config": backbone}
    config = EdgeTamVideoConfig(
        vision_config=vision,
        prompt_encoder_config={"image_size": side},
        image_size=side,
        memory_attention_rope_feat_sizes=[grid, grid],
    )
    EdgeTamVideoModel(config).eval().save_pretrained(folder)
    Sam2ImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    return folder


def sam_hq(folder: Path, full: bool = False, seed: int = 0) -> Path:
    """Save a SAM-HQ with random weights, vit_b or small."""
    from transformers import SamHQConfig, SamHQModel, SamImageProcessor

    torch.manual_seed(seed)
    side = 128
    vision = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": side, "mlp_dim": 64}
    vision |= {
        "patch_size": 8,
        "window_size": 4,
        "global_attn_indexes": [1, 3],
        "output_channels": 32,
        "num_pos_feats": 16,
    }
    decoder = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32, "vit_dim": 32}
    prompts = {"hidden_size": 32, "image_size": side, "patch_size": 8, "image_embedding_size": side // 8}
    small = {"vision_config": vision, "prompt_encoder_config": prompts, "mask_decoder_config": decoder}
    SamHQModel(SamHQConfig(**({} if full else small))).eval().save_pretrained(folder)
    side = 1024 if full else side
    pad = {"height": side, "width": side}
    SamImageProcessor(size={"longest_edge": side}, pad_size=pad).save_pretrained(folder)
    return folder


def sam3_config(side: int, words: Any, width: int = 32) -> dict[str, Any]:
    """Return the config of a small SAM 3 for images of `side` px."""
    backbone = {"model_type": "sam3_vit_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    backbone |= {"num_attention_heads": 2, "image_size": side, "patch_size": 14, "window_size": 4}
    backbone |= {"global_attn_indexes": [1], "pretrain_image_size": 56}
    sizes = [[side // 14 * scale, side // 14 * scale] for scale in (4, 2, 1)]
    text = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 32, "projection_dim": 16}
    text |= {"eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id, "pad_token_id": 0}
    part = {"hidden_size": width, "num_attention_heads": 2, "intermediate_size": 64, "num_layers": 2}
    return {
        "vision_config": {"backbone_config": backbone, "backbone_feature_sizes": sizes, "fpn_hidden_size": width},
        "text_config": text,
        "geometry_encoder_config": part,
        "detr_encoder_config": part,
        "detr_decoder_config": {**part, "num_queries": 20},
        "mask_decoder_config": {"hidden_size": width, "num_attention_heads": 2},
    }


def sam3_words(full: bool) -> Any:
    """Return the tokenizer of a SAM 3, of real size or small."""
    from transformers import CLIPTokenizerFast

    words = clip_tokenizer(CLIPTokenizerFast, CLIP_WORDS if full else None)
    words.model_max_length = 32
    return words


def stir_sam3(model: torch.nn.Module, deviation: float) -> None:
    """Randomize the heads of a SAM 3, whose initial weights give all queries one score and one box."""
    parts = ("detr_decoder", "dot_product", "mask_decoder", "text_projection")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and name.startswith(parts):
                weight.normal_(0, deviation)


def sam3(folder: Path, full: bool = False, seed: int = 0) -> Path:
    """Save a SAM 3 with random weights, of real size or small."""
    from transformers import Sam3Config, Sam3Model

    torch.manual_seed(seed)
    side, words = 1008 if full else 112, sam3_words(full)
    model = Sam3Model(Sam3Config(**({} if full else sam3_config(side, words)))).eval()
    return save_sam3(model, words, side, folder, full)


def save_sam3(model: Any, words: Any, side: int, folder: Path, full: bool) -> Path:
    """Save a SAM 3, or one with a smaller text encoder, for images of `side` px."""
    from transformers import Sam3ImageProcessor

    stir_sam3(model, 0.05 if full else 0.2)
    model.save_pretrained(folder)
    Sam3ImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def sam3_lite_text(folder: Path, full: bool = False, seed: int = 0) -> Path:
    """Save a SAM3-LiteText with random weights, of real size or small."""
    from transformers import Sam3LiteTextConfig, Sam3LiteTextModel

    torch.manual_seed(seed)
    side, words = 1008 if full else 112, sam3_words(full)
    small = {} if full else sam3_config(side, words)
    if not full:
        small["text_config"] = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
        small["text_config"] |= {"num_attention_heads": 2, "max_position_embeddings": 32, "projection_dim": 16}
    model = Sam3LiteTextModel(Sam3LiteTextConfig(**small)).eval()
    return save_sam3(model, words, side, folder, full)


def sam3_video(folder: Path, full: bool = False, seed: int = 0, **settings: Any) -> Path:
    """Save a SAM 3 for videos with random weights, of real size or small.

    Args:
        folder: Where to save it.
        full: Whether it has the real size.
        seed: Seed of the weights.
        settings: Arguments of `Sam3VideoConfig`, such as thresholds that random weights reach.
    """
    from transformers import Sam3ImageProcessor, Sam3VideoConfig, Sam3VideoModel, Sam3VideoProcessor
    from transformers.models.sam2_video import Sam2VideoVideoProcessor

    torch.manual_seed(seed)
    side, words = 1008 if full else 112, sam3_words(full)
    grid, size = side // 14, {"height": side, "width": side}
    small: dict[str, Any] = {}
    if not full:
        detector = sam3_config(side, words, 256)
        vision = {"model_type": "sam3_vision_model", **detector["vision_config"]}
        tracker = {
            "vision_config": vision,
            "prompt_encoder_config": {"image_size": side},
            "image_size": side,
            "memory_attention_num_layers": 1,
            "memory_attention_rope_feat_sizes": [grid, grid],
        }
        small = {"detector_config": detector, "tracker_config": tracker, "low_res_mask_size": 4 * grid}
    model = Sam3VideoModel(Sam3VideoConfig(**small, **settings)).eval()
    stir_sam3(model.detector_model, 0.05 if full else 0.2)
    model.save_pretrained(folder)
    video = Sam2VideoVideoProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    Sam3VideoProcessor(Sam3ImageProcessor(size=size), video, words).save_pretrained(folder)
    return folder


def florence2(folder: Path, full: bool = False, seed: int = 0) -> Path:
    """Save a Florence-2 with random weights, small or of the size of Florence-2-base, that outputs some locations."""
    from transformers import (
        CLIPImageProcessor,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
        RobertaTokenizerFast,
    )

    torch.manual_seed(seed)
    letters = ["Ġ", "Ċ", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789,.-'"]
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *letters]
    pieces += [f"<unused_{i}>" for i in range((50265 if full else 100) - len(pieces) - 1)]
    words = RobertaTokenizerFast(
        vocab={piece: i for i, piece in enumerate([*pieces, "<mask>"])},
        merges=[],
        model_max_length=1024,
        extra_special_tokens={"image_token": "<image>"},
    )
    words.add_tokens([f"<loc_{i}>" for i in range(1000)])
    size = 768 if full else 32
    text = {"model_type": "bart", "vocab_size": len(words), "d_model": size, "max_position_embeddings": 1024}
    text |= dict.fromkeys(("encoder_layers", "decoder_layers"), 6 if full else 2)
    text |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 12 if full else 2)
    text |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 4 * size)
    vision: dict[str, object] = {"projection_dim": size}
    if not full:
        vision |= {"depths": [1, 1, 1, 1], "embed_dim": [8, 16, 16, 32], "num_heads": [1, 2, 2, 2]}
        vision |= {"num_groups": [1, 2, 2, 2], "window_size": 4}
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=words.image_token_id)
    model = Florence2ForConditionalGeneration(config).eval()
    with torch.no_grad():  # initial weights repeat one token
        shared = model.get_input_embeddings().weight
        shared.normal_(0, 0.05)
        shared[words.convert_tokens_to_ids("<loc_0>") :] *= 3
        for name, weight in model.model.language_model.named_parameters():
            if weight.ndim > 1 and "attn" in name:
                weight.normal_(0, size**-0.5)
    model.generation_config.max_length = None
    model.generation_config.no_repeat_ngram_size = 1
    model.save_pretrained(folder)
    side = 768 if full else 64
    images = CLIPImageProcessor(
        size={"height": side, "width": side}, do_center_crop=False, image_mean=[0.485, 0.456, 0.406]
    )
    images.image_seq_length = (side // 32) ** 2 + 1
    kinds = ("ocr", "phrase_grounding", "pure_text", "description_with_bboxes", "description_with_polygons")
    kinds += ("polygons", "bboxes", "description_with_bboxes_or_polygons")
    Florence2Processor(images, words, post_processor_config={kind: {} for kind in kinds}).save_pretrained(folder)
    return folder


#: A chat template that shows an image and a text, as those of Qwen and Molmo do.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(special: list[str], size: int = 0) -> Any:
    """Return a tokenizer of single bytes, with special tokens after them, padded to `size` tokens."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    pieces = sorted(ByteLevel.alphabet())
    pieces += [f"[unused{i}]" for i in range(max(0, size - len(pieces) - len(special)))]
    words = Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    words.add_tokens(special, special_tokens=True)
    return words


def qwen3_vl(folder: Path, full: bool = False, seed: int = 0, answers: dict[str, str] | None = None) -> Path:
    """Save a Qwen3-VL with random weights, of the size of Qwen3-VL-2B or small; see `train_to_answer`."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    torch.manual_seed(seed)
    marks = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = byte_tokenizer(marks, 151936 if full else 0)
    text: dict[str, Any] = {"vocab_size": len(words), "max_position_embeddings": 4096}
    vision: dict[str, Any] = {}
    if full:
        text |= {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
        text |= {"num_key_value_heads": 8, "head_dim": 128}
        vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2048}
        vision |= {"deepstack_visual_indexes": [5, 11, 17]}
    else:
        text |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        text |= {"num_key_value_heads": 2, "head_dim": 16}
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True}
    text["rope_parameters"]["mrope_section"] = [24, 20, 20] if full else [4, 2, 2]
    ids = words.convert_tokens_to_ids(marks)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **dict(zip(names, ids[2:], strict=True))
    )
    model = Qwen3VLForConditionalGeneration(config).eval()
    pixels = {"min_pixels": 32 * 32, "max_pixels": (1024 if full else 96) ** 2, "patch_size": 16}
    template = CHAT_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    images, videos = Qwen2VLImageProcessor(**pixels), Qwen3VLVideoProcessor()
    return save_vlm(model, Qwen3VLProcessor(images, words, videos, chat_template=template), folder, answers)


def qwen2_5_vl(folder: Path, seed: int = 0, answers: dict[str, str] | None = None) -> Path:
    """Save a small Qwen2.5-VL with random weights; see `train_to_answer`."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    torch.manual_seed(seed)
    marks = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = byte_tokenizer(marks)
    text = {"vocab_size": len(words), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"fullatt_block_indexes": [1], "window_size": 56}
    ids = words.convert_tokens_to_ids(marks)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **dict(zip(names, ids[2:], strict=True))
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    template = CHAT_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=84**2)
    processor = Qwen2_5_VLProcessor(images, words, Qwen2VLVideoProcessor(), chat_template=template)
    return save_vlm(model, processor, folder, answers)


def molmo2(folder: Path, seed: int = 0, answers: dict[str, str] | None = None) -> Path:
    """Save a small Molmo 2 with random weights; see `train_to_answer`."""
    from transformers import (
        Molmo2Config,
        Molmo2ForConditionalGeneration,
        Molmo2ImageProcessor,
        Molmo2Processor,
        Molmo2VideoProcessor,
    )

    torch.manual_seed(seed)
    marks = ["<|im_start|>", "<|im_end|>", "<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>"]
    marks += ["<|image|>", "<im_low>", "<frame_start>", "<frame_end>", "<|video|>"]
    words = byte_tokenizer(marks)
    text = {"vocab_size": len(words), "additional_vocab_size": 0, "hidden_size": 64, "intermediate_size": 128}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 16, "image_size": [56, 56]}
    adapter = {"vision_feature_layer": [1, 0], "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    adapter |= {"head_dim": 16, "intermediate_size": 64, "text_hidden_size": 64}
    ids = {mark: words.convert_tokens_to_ids(mark) for mark in marks}
    config = Molmo2Config(
        text_config=text,
        vision_config=vision,
        adapter_config=adapter,
        image_start_token_id=ids["<im_start>"],
        low_res_image_start_token_id=ids["<low_res_im_start>"],
        image_end_token_id=ids["<im_end>"],
        image_patch_id=ids["<im_patch>"],
        frame_start_token_id=ids["<frame_start>"],
        frame_end_token_id=ids["<frame_end>"],
    )
    model = Molmo2ForConditionalGeneration(config).eval()
    images = Molmo2ImageProcessor(size={"height": 56, "width": 56}, max_crops=1, overlap_margins=[1, 1])
    template = CHAT_TEMPLATE.replace("IMAGE", "<|image|>")
    processor = Molmo2Processor(images, Molmo2VideoProcessor(), words, chat_template=template)
    return save_vlm(model, processor, folder, answers)


def save_vlm(model: Any, processor: Any, folder: Path, answers: dict[str, str] | None) -> Path:
    """Save a vision-language model, trained to give some answers."""
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    if answers:
        train_to_answer(model, processor, answers)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def train_to_answer(model: Any, processor: Any, answers: dict[str, str], steps: int = 300) -> None:
    """Train a small vision-language model until it gives each question its answer, whatever the image.

    Raises:
        RuntimeError: If it does not learn them.
    """
    from PIL import Image

    optimizer, batches = torch.optim.AdamW(model.parameters(), 5e-3), []
    for question, answer in answers.items():
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        image = Image.new("RGB", (96, 64), "gray")
        start = processor(text=[text], images=[image], return_tensors="pt")["input_ids"].shape[1]
        inputs = processor(text=[f"{text}{answer}<|im_end|>"], images=[image], return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[:, :start] = -100
        batches.append({**inputs, "labels": labels})
    model.train()
    for _ in range(steps):
        losses = [model(**batch).loss for batch in batches]
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if max(float(loss) for loss in losses) < 0.01:
            model.eval()
            return
    raise RuntimeError(f"the loss is still {max(map(float, losses)):.3f}")


def rf_detr(folder: Path, full: bool = False, seed: int = 0) -> Path:
    """Save an RF-DETR with masks and random weights, of the size of rf-detr-seg-medium or small."""
    from transformers import RfDetrConfig, RfDetrForInstanceSegmentation, RfDetrImageProcessor

    torch.manual_seed(seed)
    names = ["N/A", "car", "wheel", "traffic light", "N/A", "dog"]
    labels: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    side = 432 if full else 96
    small = {"d_model": 32, "decoder_ffn_dim": 64, "decoder_layers": 2, "num_queries": 20, "intermediate_size": 64}
    small |= {"decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 4, "group_detr": 2}
    backbone = {"model_type": "rf_detr_dinov2", "num_attention_heads": 6 if full else 2, "image_size": side}
    backbone |= {"hidden_size": 384 if full else 32, "patch_size": 12, "num_register_tokens": 0, "num_windows": 2}
    backbone |= {"out_features": ["stage3", "stage6", "stage9", "stage12"] if full else ["stage1", "stage2"]}
    backbone |= {} if full else {"num_hidden_layers": 2}
    sizes = {"num_queries": 200, "decoder_layers": 5} if full else small
    model = RfDetrForInstanceSegmentation(RfDetrConfig(backbone_config=backbone, **sizes, **labels)).eval()
    with torch.no_grad():  # initial heads give all queries one score and one box
        for name, weight in model.named_parameters():
            if any(part in name for part in ("class_embed", "bbox_embed", "query_features", "spatial_features")):
                weight.normal_(0, 0.02 if full else 0.3)
    model.save_pretrained(folder)
    RfDetrImageProcessor(size={"height": side, "width": side}, do_pad=False).save_pretrained(folder)
    return folder


def embedder(folder: Path, kind: str = "dinov2", seed: int = 0) -> Path:
    """Save a small DINOv2 (`dinov2`), SigLIP (`siglip`) or CLIP (`clip`) with random weights, without a tokenizer."""
    from transformers import (
        BitImageProcessor,
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        Dinov2Config,
        Dinov2Model,
        SiglipConfig,
        SiglipImageProcessor,
        SiglipModel,
    )

    torch.manual_seed(seed)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision, side = {**small, "intermediate_size": 64, "image_size": 32, "patch_size": 8}, {"height": 32, "width": 32}
    text = {**small, "intermediate_size": 64, "vocab_size": 100}
    model: Any
    images: Any
    if kind == "dinov2":
        model = Dinov2Model(Dinov2Config(**small, mlp_ratio=2, image_size=32, patch_size=8))
        images = BitImageProcessor(size={"shortest_edge": 32}, crop_size=side)
    elif kind == "siglip":
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        images = SiglipImageProcessor(size=side)
    else:
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
        images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side)
    model.eval().save_pretrained(folder)
    images.save_pretrained(folder)
    return folder


def image_text(folder: Path, kind: str, full: bool = False, seed: int = 0) -> Path:
    """Save a SigLIP (`siglip`), SigLIP 2 of any aspect ratio (`siglip2`) or CLIP (`clip`) with random weights.

    Args:
        folder: Where to save it.
        kind: Which model.
        full: Whether it has the size of the base models with patches of 16 px, else of 32 px images.
        seed: Seed of the weights.
    """
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizer,
        Siglip2Config,
        Siglip2ImageProcessor,
        Siglip2Model,
        Siglip2Processor,
        SiglipConfig,
        SiglipImageProcessor,
        SiglipModel,
        SiglipProcessor,
    )

    torch.manual_seed(seed)
    # The processor of SigLIP 2 always makes 256 patches of 16 px.
    side, patch = (256, 16) if kind == "siglip2" else (224, 16) if full else (32, 8)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {} if full else small
    words: Any = clip_tokenizer(CLIPTokenizer) if kind == "clip" else tokenizer()
    text = {**sizes, "vocab_size": len(words), "pad_token_id": words.pad_token_id}
    vision = {**sizes, "image_size": side, "patch_size": patch}
    images: Any
    if kind == "clip":
        text |= {"max_position_embeddings": 77, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=512 if full else 24)
        images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        model, processor = CLIPModel(config), CLIPProcessor(images, words)
    elif kind == "siglip":
        text |= {"bos_token_id": words.cls_token_id, "eos_token_id": words.sep_token_id, "max_position_embeddings": 64}
        images = SiglipImageProcessor(size={"height": side, "width": side})
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        processor = SiglipProcessor(images, words)
    else:
        text |= {"bos_token_id": words.cls_token_id, "eos_token_id": words.sep_token_id, "max_position_embeddings": 64}
        patches = (side // patch) ** 2
        del vision["image_size"]
        images = Siglip2ImageProcessor(patch_size=patch, max_num_patches=patches)
        model = Siglip2Model(Siglip2Config(text_config=text, vision_config={**vision, "num_patches": patches}))
        processor = Siglip2Processor(images, words)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)  # SigLIP's own initial values are zero
        if kind != "clip":
            model.logit_bias.fill_(-1.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
