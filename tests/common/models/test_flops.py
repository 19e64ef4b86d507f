"""Counted FLOPs against torch's own counter and against the published table."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from frugal.common.models.flops import dual_encoder_flops, image_flops, text_flops
from frugal.common.models.named import flip_encoder
from frugal.common.reduction.image import KeptPatches


@pytest.mark.parametrize(
    ("name", "image", "text"), [("B/16", 35.1, 2.4), ("L/16", 123.1, 5.5), ("H/14", 334.6, 19.4)]
)
def test_flips_models_cost_what_was_published(name: str, image: float, text: float) -> None:
    config = flip_encoder(name)
    counted = image_flops(config.image, config.image.num_patches) / 1e9
    assert counted == pytest.approx(image, abs=0.06)
    assert text_flops(config.text, config.text.length) / 1e9 == pytest.approx(text, abs=0.06)


@pytest.mark.parametrize(("patches", "head_width"), [(None, None), (5, None), (5, 13)])
def test_the_count_is_that_of_torch(patches: int | None, head_width: int | None) -> None:
    published = flip_encoder("B/16", image_size=(48, 64), text_length=9)
    small = {"width": 24, "depth": 3, "heads": 2, "mlp_width": 40}
    config = replace(
        published,
        image=replace(published.image, **small),
        # every token is pooled, so that no block may leave one out
        text=replace(published.text, **small, vocabulary=50, pooling="mean_all"),
        embed_dim=8,
        head_width=head_width,
    )
    model = config.build()
    images = torch.zeros(2, 3, 48, 64, dtype=torch.uint8)
    kept = None if patches is None else KeptPatches.dense(torch.arange(patches).expand(2, -1))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode_image(images, kept)
        model.encode_text(torch.ones(2, 9, dtype=torch.long), torch.tensor([9, 4]))
    expected = dual_encoder_flops(config, patches=patches or 12, tokens=9)
    assert counter.get_total_flops() == 2 * expected
