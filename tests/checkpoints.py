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
    from transformers import Sam3Config, Sam3ImageProcessor, Sam3Model

    torch.manual_seed(seed)
    side, words = 1008 if full else 112, sam3_words(full)
    model = Sam3Model(Sam3Config(**({} if full else sam3_config(side, words)))).eval()
    stir_sam3(model, 0.05 if full else 0.2)
    model.save_pretrained(folder)
    Sam3ImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


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
