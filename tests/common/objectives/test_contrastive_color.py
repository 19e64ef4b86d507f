"""Color jitter inside the contrastive objective."""

from dataclasses import replace

import torch

from frugal.common.contracts import Batch
from frugal.common.data.color import ColorJitter
from frugal.common.models.named import clip_encoder
from frugal.common.objectives.contrastive import Contrastive, ContrastiveObjective
from frugal.common.randomness import SampleNoise
from frugal.common.reduction.image import KeepAll


def objective(color: ColorJitter) -> ContrastiveObjective:
    config = clip_encoder("Ti/8", image_size=16, text_length=5)
    config = replace(
        config, image=replace(config.image, depth=1), text=replace(config.text, depth=1)
    )
    model = config.build(torch.Generator().manual_seed(1))
    return ContrastiveObjective(model, Contrastive(), reduction=KeepAll(), seed=7, color=color)


def batch() -> Batch:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return Batch(
        images=images,
        sample_numbers=torch.arange(40, 46),
        valid=torch.ones(6, dtype=torch.bool),
        token_ids=torch.randint(1, 99, (6, 5), generator=generator),
        text_lengths=torch.full((6,), 5),
    )


def test_the_loss_is_that_of_images_in_the_colors_of_their_samples():
    jitter, samples = ColorJitter(), batch()
    recolored = jitter.apply(samples.images, noise=SampleNoise(7, samples.sample_numbers))
    assert not torch.equal(recolored, samples.images)
    plain = objective(ColorJitter(probability=0.0, gray=0.0))
    expected = plain(replace(samples, images=recolored))[0]
    loss = objective(jitter)(samples)[0]
    assert torch.equal(loss, expected)
    assert not torch.equal(loss, plain(samples)[0])


def test_pictures_of_a_batch_show_the_colors_that_are_trained_on():
    jitter, samples = ColorJitter(gray=1.0), batch()
    picture = objective(jitter).draw(samples)
    assert (picture[0] == picture[1]).all() and (picture[1] == picture[2]).all()
