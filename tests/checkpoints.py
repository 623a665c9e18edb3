"""Randomly initialised checkpoints of the real classes, saved as a user would have them."""

from __future__ import annotations

from pathlib import Path

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
    """BERT's scheme with some words, every letter as a piece, and delimiters at BERT's own ids."""
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
    """A Grounding DINO (or MM-Grounding-DINO) with random weights: real size (Swin-T, BERT-base) or small."""
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
    with torch.no_grad():  # fresh weights all but ignore the text; make it matter
        for name, weight in model.named_parameters():
            if name.endswith(("vision_param", "text_param")):
                weight.fill_(0.5)
    model.save_pretrained(folder)
    size = {} if full else {"size": {"shortest_edge": 96, "longest_edge": 160}}
    GroundingDinoProcessor(GroundingDinoImageProcessor(**size), words).save_pretrained(folder)
    return folder


def sam(path: Path) -> Path:
    """SAM vit_b with random weights, as `.pth`."""
    from segment_anything import sam_model_registry

    torch.manual_seed(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(sam_model_registry["vit_b"]().state_dict(), path)
    return path


def sam2(path: Path, config: str = "sam2.1_hiera_t.yaml") -> Path:
    """SAM 2.1 hiera-tiny with random weights, as `.pt` with the wrapping of the official files."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from grounded_sam.config import undisturbed_hydra

    with undisturbed_hydra():
        import sam2 as package

        torch.manual_seed(2)
        cfg = OmegaConf.load(Path(package.__file__).parent / "configs" / "sam2.1" / config)
        model = instantiate(cfg.model)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict()}, path)
    return path
