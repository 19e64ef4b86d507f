"""Images and texts to unit-norm embeddings, as the evaluations need them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- the name everyone knows
from torch import Tensor, nn

from frugal.common.data.tokenizers import padded
from frugal.common.data.transforms import normalize
from frugal.common.distributed import Ranks
from frugal.common.errors import InputError, NotFiniteError
from frugal.common.evaluation.task import ImageEvaluation
from frugal.common.models.bundle import ImageSpec, ModelBundle
from frugal.common.models.clip import DualEncoder
from frugal.common.models.image_encoder import image_encoder
from frugal.common.models.vit import ImageTower, ImageTransformer
from frugal.common.randomness import SampleNoise, sample_generator
from frugal.common.reduction.image import KeptPatches, PatchView
from frugal.common.reduction.random_masking import PURPOSE, RandomMasking
from frugal.common.reduction.text import PositionedTokens
from frugal.common.run import Run


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients; every module's mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def product_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Of matrix products: the precision that a recipe trains in, on CUDA; float32 elsewhere."""
    if device.type != "cuda" or precision == "float32":
        return torch.float32
    if precision == "float16":
        return torch.float16
    if precision == "auto" and not torch.cuda.is_bf16_supported():
        return torch.float32
    return torch.bfloat16


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Compute matrix products in :func:`product_dtype`."""
    dtype = product_dtype(precision, device)
    return nullcontext() if dtype == torch.float32 else torch.autocast("cuda", dtype=dtype)


def check_usable(made: str, *counts: tuple[int, int, str]) -> None:
    """Refuse numbers that a model gave no answers for.

    Args:
        made: what cannot be used where it is not finite, or zero: embeddings, scores.
        counts: how many are unusable, of how many, of what.

    Raises:
        NotFiniteError: if there are any.
    """
    words = [f"{bad:,} of {of:,} {what}" for bad, of, what in counts if bad]
    if words:
        raise NotFiniteError(
            f"the {made} of {' and of '.join(words)} are not finite or are zero, so that nothing "
            "can be measured; check the weights (training may have diverged) and the precision "
            "(float16 may overflow)"
        )


TEXTS_AT_ONCE = 256
"""Texts in one forward pass."""


@dataclass(frozen=True)
class MaskedViews:
    """Random parts of the patches of an image, seen one after the other.

    Source: the ensemble of masked views of Li et al., arXiv:2212.00794, section 4.1.
    """

    masking: RandomMasking
    """How much each view leaves out; the first is what it would draw in training."""
    count: int
    """Views of every image."""
    seed: int

    def of(self, view: PatchView, places: Tensor) -> Iterator[KeptPatches]:
        """The patches of each view, (B, K), a function of the seed and the places (B,) alone.

        As many views as fit into an image share out one permutation of its patches; further ones
        share out the next.
        """
        num_kept = self.masking.num_kept(view.num_patches)
        together = view.num_patches // num_kept
        noise = SampleNoise(self.seed, places)
        for first in range(0, self.count, together):
            purpose = f"{PURPOSE} {first}" if first else PURPOSE
            order = noise.uniform(purpose, view.num_patches).argsort(dim=1, stable=True)  # (B, N)
            views = min(together, self.count - first)
            yield from map(KeptPatches.dense, order[:, : views * num_kept].split(num_kept, dim=1))


class EncoderAlone(nn.Module):
    """An image tower without a text tower beside it, asked for embeddings like a dual encoder."""

    def __init__(self, image: ImageTransformer) -> None:
        """Take the tower."""
        super().__init__()
        self.image = image

    def encode_image(self, images: Tensor, kept: KeptPatches | None = None) -> Tensor:
        """(B, 3, H, W) to (B, D): what it pools."""
        return self.image.forward_pooled(images, kept)


def embedding_model(bundle: ModelBundle) -> nn.Module:
    """What embeds images and, where the model reads captions, those."""
    if bundle.text is not None:
        return bundle.model
    device = next(bundle.model.parameters()).device
    return EncoderAlone(image_encoder(bundle).build(needs_norm=False)).to(device).eval()


class Embedder:
    """A dual encoder with its tokenizer: what goes in is images and strings.

    Args:
        model: has ``encode_image(images)`` and ``encode_text(token_ids, text_lengths)``; with
            views ``encode_image(images, kept)``.
        tokenizer: has ``encode``, ``assemble`` and ``pad_id``; None if the model reads no captions.
        context_length: tokens of every text, padding included.
        precision: of the matrix products on CUDA; elsewhere float32.
        image: the image tower, for images that are not uint8 and for views.
        views: what of an image the model sees; all of it by default.
        shorten: from a text to at most ``context_length`` token ids, special tokens included; by
            default the first that fit.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        context_length: int,
        device: torch.device,
        precision: str = "float32",
        image: ImageSpec | None = None,
        views: MaskedViews | None = None,
        shorten: Callable[[str], Sequence[int]] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.device = device
        self.precision = precision
        self.image = image
        self.views = views
        self.shorten = shorten
        self._unusable = torch.zeros(2, dtype=torch.int64, device=device)
        """Images and texts whose embedding is not finite or zero; read once, at the end."""
        self._asked = [0, 0]
        self.cut: set[str] = set()
        """Texts that had more tokens than the model sees."""

    @contextmanager
    def measuring(self, ranks: Ranks) -> Iterator[None]:
        """As :func:`evaluating`, and at its end no embedding may have been unusable.

        Every one of the processes must call this.

        Raises:
            NotFiniteError: if images or texts have embeddings that are not finite, or zero; such a
                one is as far from every class as from any other, and would be counted as an answer.
        """
        self._unusable.zero_()
        self._asked = [0, 0]
        with evaluating(self.model):
            yield
        asked = torch.tensor(self._asked, device=self.device)
        counts = ranks.sum(torch.stack([self._unusable, asked])).tolist()
        check_usable("embeddings", *zip(*counts, ("images", "texts"), strict=True))

    def _unit(self, features: Tensor, what: int) -> Tensor:
        """(B, E) float32 of length 1; those that cannot be are counted, 0 images and 1 texts."""
        features = features.float()
        usable = features.isfinite().all(1) & (features != 0).any(1)
        self._unusable[what] += (~usable).sum()
        return F.normalize(features, dim=-1)

    @classmethod
    def of(cls, bundle: ModelBundle, run: Run, task: ImageEvaluation | None = None) -> Embedder:
        """The model as it was trained, on the device of the run.

        Args:
            bundle: two towers, or an image tower alone.
            run: where it runs.
            task: says what of every image and text the model sees; all of it by default.

        Raises:
            InputError: if the tokenizer or the text reduction cannot be loaded, or the task keeps
                no patch of an image.
        """
        views, image = None, bundle.image
        if task is not None and task.mask_ratio:
            if not isinstance(image, ImageTower):
                raise InputError(
                    f"the mask_ratio of {task.name} is {task.mask_ratio}, but this model's image "
                    "tower is another library's and sees every patch; leave it out"
                )
            masking = RandomMasking(mask_ratio=task.mask_ratio)
            masking.num_kept(image.num_patches)
            views = MaskedViews(masking, task.views, bundle.seed)
        return cls(
            embedding_model(bundle),
            bundle.tokenizer,
            context_length=0 if bundle.text is None else bundle.text.length,
            device=torch.device(run.device),
            precision=bundle.precision,
            image=image,
            views=views,
            shorten=_as_in_training(bundle) if task is not None and task.reduces_texts else None,
        )

    @cached_property
    def width(self) -> int:
        """Length of an embedding; also known to a process that has nothing to embed."""
        if self.tokenizer is not None:
            return self._text_features([self.token_ids("")]).shape[1]
        assert self.image is not None
        blank = torch.zeros(1, 3, *self.image.height_width, dtype=torch.uint8, device=self.device)
        return self._see(blank).shape[1]

    def images(self, images: Tensor, places: Tensor | None = None) -> Tensor:
        """(B, E) float32 unit vectors on the device.

        Args:
            images: (B, 3, H, W) on any device; uint8, or float32 gray levels.
            places: (B,) int64 numbers of the images in their data, which views are drawn for.
        """
        images = self.normalized(images.to(self.device, non_blocking=True))
        self._asked[0] += len(images)
        if self.views is None:
            return self._unit(self._see(images), 0)
        assert isinstance(self.image, ImageTower) and places is not None
        view = PatchView.of(images, self.image)
        parts = self.views.of(view, places.to(self.device, non_blocking=True))
        seen = [F.normalize(self._see(images, part), dim=-1) for part in parts]
        return self._unit(torch.stack(seen).mean(0), 0)  # (B, E)

    def _see(self, images: Tensor, *kept: KeptPatches) -> Tensor:
        with autocast(self.precision, self.device):
            features: Tensor = self.model.encode_image(images, *kept)
        return features.float()  # (B, E)

    def normalized(self, images: Tensor) -> Tensor:
        """Float images as towers take them; they normalize uint8 themselves."""
        if images.dtype == torch.uint8:
            return images
        assert self.image is not None
        return normalize(images, mean=self.image.mean, std=self.image.std)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), E) float32 on the device, 256 texts at a time."""
        return self.tokens([self.token_ids(text) for text in texts])

    def token_ids(self, text: str) -> tuple[int, ...]:
        """What of a text the model sees."""
        if self.shorten is not None:
            return tuple(self.shorten(text))
        whole = self.tokenizer.encode(text)
        ids = tuple(self.tokenizer.assemble(whole, self.context_length))
        if len(ids) == self.context_length and len(self._longer(whole)) > len(ids):
            self.cut.add(text)
        return ids

    def _longer(self, ids: Sequence[int]) -> Sequence[int]:
        return self.tokenizer.assemble(ids, self.context_length + 1)

    def tokens(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """(len(texts), E) float32 on the device, from the token ids of texts, 256 at a time."""
        parts = [
            self._encode(texts[start : start + TEXTS_AT_ONCE])
            for start in range(0, len(texts), TEXTS_AT_ONCE)
        ]
        return torch.cat(parts)

    def _encode(self, texts: Sequence[Sequence[int]]) -> Tensor:
        self._asked[1] += len(texts)
        return self._unit(self._text_features(texts), 1)  # (B, E)

    def _text_features(self, texts: Sequence[Sequence[int]]) -> Tensor:
        # our towers fill captions up themselves where padding changes their vector
        length = None if isinstance(self.model, DualEncoder) else self.context_length
        token_ids, lengths = padded(texts, self.tokenizer, length=length)
        with autocast(self.precision, self.device):
            return self.model.encode_text(token_ids.to(self.device), lengths.to(self.device))


def _as_in_training(bundle: ModelBundle) -> Callable[[str], Sequence[int]]:
    """The text reduction of training; what it draws for a text depends on the text alone.

    Raises:
        InputError: if the reduction lacks what it needs, or its tokens keep their slots.
    """
    reduction, tokenizer = bundle.text_reduction, bundle.tokenizer
    assert bundle.text is not None and tokenizer is not None
    if reduction is None:
        raise InputError(
            f"it is not known how captions of {bundle.source.path} were shortened in training; "
            "leave reduce_prompts out"
        )
    length = bundle.text.length
    reduction.prepare(tokenizer, length=length)

    def shorten(text: str) -> Sequence[int]:
        number = zlib.crc32(text.encode())
        generator = sample_generator(bundle.seed, "prompt", number)
        found = reduction.encode(text, tokenizer, length=length, generator=generator)
        if isinstance(found, PositionedTokens):
            raise InputError(
                f"{type(reduction).__name__} leaves tokens in their slots, which prompts cannot; "
                "leave reduce_prompts out"
            )
        return found

    return shorten


def text_table(embedder: Embedder, texts: Sequence[str], *, ranks: Ranks) -> Tensor:
    """(len(texts), E) on every process; equal texts have equal embeddings to the last bit.

    Texts are equal if their token ids are, as long ones with the same beginning. Each is encoded
    once, by one process, in the same company on any number of them.
    """
    seen = {text: embedder.token_ids(text) for text in dict.fromkeys(texts)}
    # all texts of a group are computed at the length of its longest
    distinct = sorted(dict.fromkeys(seen.values()), key=len)
    table = ranks.table(
        len(distinct),
        embedder.width,
        chunk=TEXTS_AT_ONCE,
        device=embedder.device,
        fill=lambda rows: embedder.tokens(distinct[rows]),
    )
    place = {ids: row for row, ids in enumerate(distinct)}
    return table[torch.tensor([place[seen[text]] for text in texts], device=embedder.device)]
