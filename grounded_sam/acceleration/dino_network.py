"""Grounding DINO and MM-Grounding-DINO part by part, so that no part is computed twice and each is one CUDA graph."""

from __future__ import annotations

import logging
import math
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from grounded_sam.acceleration.cuda_graphs import GraphedFunction
from grounded_sam.acceleration.patching import TrialInputs, max_relative_error

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)

#: Image sizes whose position embeddings are kept, 23 MB each for the largest images of the published models.
MAX_SIZES = 8
#: Height and width of the image on which a network is tried, whose maps have more than one pixel each, and queries.
TRIAL_SIZE, TRIAL_QUERIES = (72, 88), 64
#: Largest difference from the forward pass of transformers, relative to the largest value.
TOLERANCE = 1e-4
#: Parts of the names of weights that stay in float32: boxes and scores, and the text encoder, which runs once per text.
FLOAT32_PARTS = ("bbox_embed", "class_embed", "text_backbone", "text_projection")


class Predictions(NamedTuple):
    """What the network says about a batch of images.

    Attributes:
        logits: Match of each query with each token of the text, `(b, queries, tokens)` of float32.
        pred_boxes: Box of each query, center, width and height as parts of the image, `(b, queries, 4)` of float32.
    """

    logits: Tensor
    pred_boxes: Tensor


class DetectorNetwork(Protocol):
    """A network that runs each of its parts as seldom as possible."""

    def encode_text(self, ids: Sequence[int]) -> Any:
        """Encode the token ids of a prompt, for any number of images."""

    def encode_images(self, pixels: Tensor) -> Any:
        """Encode images `(b, 3, h, w)`, for any number of prompts."""

    def predict(self, images: Any, text: Any) -> Predictions:
        """Return the predictions for encoded images and an encoded prompt."""

    def to_dtype(self, dtype: torch.dtype) -> None:
        """Convert the weights; boxes and scores stay float32."""


@dataclass(frozen=True)
class EncodedText:
    """A prompt as the network takes it, with a batch dimension of one.

    Attributes:
        features: Features of the tokens, `(1, t, c)`.
        mask: 0 between tokens of a phrase and the lowest number elsewhere, `(1, 1, t, t)`.
        positions: Embedding of the position in the phrase, `(1, t, c)`.
    """

    features: Tensor
    mask: Tensor
    positions: Tensor


class DinoNetwork:
    """Run the modules of a model of transformers in the order of its own `forward`, without what detection never reads.

    A prompt is encoded once; embeddings that depend only on the image size are kept; heads run for the last layer and
    the chosen queries alone. There is no step whose shape depends on values. Images have no padding but that of the
    patches, and text has none. Images with fewer positions than the model has queries have as many queries as
    positions.

    Args:
        model: A `GroundingDinoForObjectDetection` or `MMGroundingDinoForObjectDetection`.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self._encode_images = GraphedFunction(self._backbone, "the detector's image backbone")
        self._predict = GraphedFunction(self._transformer, "the detector's transformer")
        self._constants: OrderedDict[tuple[tuple[int, int], ...], tuple[Tensor, ...]] = OrderedDict()
        self._wavelengths = _wavelengths(model)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations."""
        return self.model.model.level_embed.dtype  # type: ignore[no-any-return]

    def to_dtype(self, dtype: torch.dtype) -> None:
        """Convert weights, except those of boxes, scores and text."""
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if tensor.is_floating_point() and not any(part in name for part in FLOAT32_PARTS):
                tensor.data = tensor.data.to(dtype)
        self._constants.clear()

    def encode_text(self, ids: Sequence[int]) -> EncodedText:
        """Encode the token ids of a prompt."""
        import torch

        inner = self.model.model
        split = sys.modules[type(inner).__module__].generate_masks_with_special_tokens_and_transfer_map
        tokens = torch.tensor([ids], device=self.model.device)
        is_same_phrase, places = split(tokens, inner.special_tokens)
        hidden = inner.text_backbone(tokens, is_same_phrase[:, None], torch.zeros_like(tokens), places)
        features = inner.text_projection(hidden.last_hidden_state).to(self.dtype)
        positions = inner.encoder.layers[0].get_text_position_embeddings(features, None, places)
        mask = (~is_same_phrase)[:, None].to(self.dtype) * torch.finfo(self.dtype).min
        return EncodedText(features, mask, positions)

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps of images `(b, 3, h, w)`, each `(b, c, h, w)`."""
        return self._encode_images(pixels)  # type: ignore[no-any-return]

    def predict(self, images: tuple[Tensor, ...], text: EncodedText) -> Predictions:
        """Return the predictions for what `encode_images` and `encode_text` returned."""
        constants = self._constants_of(tuple((x.shape[2], x.shape[3]) for x in images))
        # Captured graphs read no memory that may be freed: all tensors but weights are inputs.
        return Predictions(*self._predict(*images, *constants, text.features, text.mask, text.positions))

    def _backbone(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Compute `encode_images`."""
        inner = self.model.model
        features = inner.backbone.conv_encoder.model(pixels, return_dict=True).feature_maps
        count = len(features)
        maps = [project(x) for project, x in zip(inner.input_proj_vision, features, strict=False)]
        for project in inner.input_proj_vision[count:]:
            maps.append(project(features[-1] if len(maps) == count else maps[-1]))
        return tuple(maps)

    def _constants_of(self, sizes: tuple[tuple[int, int], ...]) -> tuple[Tensor, ...]:
        """Return what depends only on the sizes of the maps: positions, references, invalid, proposals, shapes."""
        if sizes not in self._constants:
            self._constants[sizes] = self._make_constants(sizes)
            if len(self._constants) > MAX_SIZES:
                self._constants.popitem(last=False)
        self._constants.move_to_end(sizes)
        return self._constants[sizes]

    def _make_constants(self, sizes: tuple[tuple[int, int], ...]) -> tuple[Tensor, ...]:
        import torch

        inner, device = self.model.model, self.model.device
        positions = []
        for (height, width), level in zip(sizes, inner.level_embed, strict=True):
            is_image = torch.ones(1, height, width, dtype=torch.bool, device=device)
            embedding = inner.backbone.position_embedding(is_image[:, None], is_image).float()
            positions.append(embedding.flatten(2).transpose(1, 2) + level.float())
        ratios = torch.ones(1, len(sizes), 2, device=device)
        references = inner.encoder.get_reference_points(sizes, ratios, device)
        # The method also projects features of the encoder, of which only the proposals, which lie on a grid, are free.
        grid = SimpleNamespace(enc_output=_identity, enc_output_norm=_identity)
        ones = torch.ones(1, references.shape[1], 1, device=device)
        is_valid, proposals = type(inner).generate_encoder_output_proposals(grid, ones, ones[..., 0] == 0, sizes)
        shapes = torch.tensor(sizes, device=device)
        return torch.cat(positions, 1).to(self.dtype), references, is_valid == 0, proposals, shapes

    def _transformer(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Compute `predict`; the tensors are the maps, what `_constants_of` returns, and an `EncodedText`."""
        import torch

        *maps, positions, references, is_invalid, proposals, shapes, text, text_mask, text_positions = tensors
        inner, b = self.model.model, len(maps[0])
        sizes = [(x.shape[2], x.shape[3]) for x in maps]
        kwargs = {"spatial_shapes": shapes, "spatial_shapes_list": sizes}
        vision, text = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1), text.expand(b, -1, -1)
        references = references.expand(b, -1, -1, -1)
        for layer in inner.encoder.layers:
            (vision, _), (text, _) = layer.fusion_layer(vision, text)
            text, _ = layer.text_enhancer_layer(text, text_mask, text_positions)
            vision, _ = layer.deformable_layer(vision, None, positions, reference_points=references, **kwargs)
        boxes = self._choose_queries(vision, text, is_invalid, proposals)

        decoder, levels = inner.decoder, len(sizes)
        hidden = inner.query_position_embeddings.weight[: boxes.shape[1]].expand(b, -1, -1)
        last = len(decoder.layers) - 1
        for i, layer in enumerate(decoder.layers):
            query_positions = decoder.reference_points_head(self._embed_boxes(boxes).to(self.dtype))
            hidden = layer(
                hidden,
                query_positions,
                reference_points=boxes[:, :, None].expand(-1, -1, levels, -1),
                vision_encoder_hidden_states=vision,
                text_encoder_hidden_states=text,
                **kwargs,
            )[0]
            if i < last:  # the heads of the model refine the boxes of the last layer
                boxes = _refine(boxes, decoder.bbox_embed[i](hidden.float()))
        hidden = decoder.layer_norm(hidden)
        boxes = _refine(boxes, self.model.bbox_embed[last](hidden.float()))
        return _token_logits(self.model.class_embed[last], hidden, text), boxes

    def _choose_queries(self, vision: Tensor, text: Tensor, is_invalid: Tensor, proposals: Tensor) -> Tensor:
        """Return the boxes `(b, queries, 4)` of the positions of the image that match any token best."""
        inner, b = self.model.model, len(vision)
        candidates = inner.enc_output_norm(inner.enc_output(vision.masked_fill(is_invalid, 0.0)))
        scores = _token_logits(inner.encoder_output_class_embed, candidates, text).amax(-1)
        best = scores.topk(min(self.config.num_queries, scores.shape[1]), 1)[1][..., None]
        candidates = candidates.gather(1, best.expand(-1, -1, candidates.shape[-1]))
        proposals = proposals.expand(b, -1, -1).gather(1, best.expand(-1, -1, 4))
        return (inner.encoder_output_bbox_embed(candidates.float()) + proposals).sigmoid()

    def _embed_boxes(self, boxes: Tensor) -> Tensor:
        """Compute `encode_sinusoidal_position_embedding` of boxes `(b, queries, 4)` in few steps."""
        import torch

        angles = boxes[..., None] * (2 * math.pi) / self._wavelengths
        waves = torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), -1).flatten(-2)
        return torch.cat((waves[..., 1:2, :], waves[..., :1, :], waves[..., 2:, :]), -2).flatten(-2)  # y before x


def _identity(x: Tensor) -> Tensor:
    return x


def _wavelengths(model: Any) -> Tensor:
    """Return the wavelength of each feature of a sine embedding, `(d / 2,)`."""
    import torch

    count = model.config.d_model // 2
    index = torch.arange(count, dtype=torch.float32, device=model.device)
    return 10000 ** (2 * torch.div(index, 2, rounding_mode="floor") / count)  # type: ignore[no-any-return]


def _refine(boxes: Tensor, change: Tensor) -> Tensor:
    """Move boxes by a change of their logits."""
    import torch

    return (change + torch.special.logit(boxes, eps=1e-5)).sigmoid()


def _token_logits(head: Any, hidden: Tensor, text: Tensor) -> Tensor:
    """Compute a `GroundingDinoContrastiveEmbedding`, or MM-Grounding-DINO's, without padding, in float32."""
    product = hidden.float() @ text.float().transpose(-1, -2)
    bias = getattr(head, "bias", None)
    return product if bias is None else product / math.sqrt(hidden.shape[-1]) + bias  # type: ignore[no-any-return]


class WholeModel:
    """Run the `forward` of a model as it is, except that the image backbone runs once for all prompts.

    Args:
        model: A `GroundingDinoForObjectDetection` or `MMGroundingDinoForObjectDetection`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def to_dtype(self, dtype: torch.dtype) -> None:
        """Convert all weights."""
        self.model.to(dtype)

    def encode_text(self, ids: Sequence[int]) -> Tensor:
        """Return the ids as a tensor `(1, t)`."""
        import torch

        return torch.tensor([ids], device=self.model.device)

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Any]:
        """Return the images, and the output of the backbone."""
        import torch

        return pixels, self.model.model.backbone(pixels, torch.ones_like(pixels[:, 0], dtype=torch.long))

    def predict(self, images: tuple[Tensor, Any], text: Tensor) -> Predictions:
        """Return the predictions for what `encode_images` and `encode_text` returned."""
        pixels, (maps, positions) = images
        backbone = self.model.model.backbone
        backbone.forward = lambda *_: (list(maps), list(positions))  # the model appends to the second
        try:
            output = self.model(pixel_values=pixels, input_ids=text.expand(len(pixels), -1))
        finally:
            del backbone.forward
        return Predictions(output.logits[..., : text.shape[1]].float(), output.pred_boxes.float())


def network_of(model: Any) -> DetectorNetwork:
    """Return the network of a model in float32: a `DinoNetwork` if it predicts what the model does.

    Both run on a small random image. If the predictions differ, a warning is logged and the result is a `WholeModel`.

    Args:
        model: A `GroundingDinoForObjectDetection` or `MMGroundingDinoForObjectDetection`.
    """
    import torch

    pixels = TrialInputs(model.model.level_embed).normal(1, 3, *TRIAL_SIZE)
    start, end, stop = model.model.special_tokens[:3].tolist()
    ids = [start, 5, 6, stop, 7, stop, end]
    whole: DetectorNetwork = WholeModel(model)
    with torch.inference_mode():
        try:
            parts = DinoNetwork(model)
            with _few_queries(model):
                expected, actual = (
                    network.predict(network.encode_images(pixels), network.encode_text(ids))
                    for network in (whole, parts)
                )
            error = max_relative_error(expected, actual)
            if error <= TOLERANCE:
                return parts
            reason = f"its error would be {error:.1e}"
        except Exception as failure:  # another version of the package may have changed the model in any way
            reason = " ".join(str(failure).split())[:200]
    log.warning("%s runs as a whole, and without CUDA graphs: %s", type(model).__name__, reason)
    return whole


@contextmanager
def _few_queries(model: Any) -> Iterator[None]:
    """Give a model as few queries as a small image has positions, of which transformers needs more than queries."""
    config, embedding = model.config, model.model.query_position_embeddings.weight
    before = config.num_queries, embedding.data
    try:
        config.num_queries = min(config.num_queries, TRIAL_QUERIES)
        embedding.data = embedding.data[: config.num_queries]
        yield
    finally:
        config.num_queries, embedding.data = before
