"""What four methods leave of a picture: ``python examples/look_at_masks.py PICTURE OUT.png``.

From left to right: the picture, FLIP's random patches, CLIPA's grid, clusters of similar patches,
and CLIP-PGS's clusters off edges. CLIPA keeps a quarter of the patches, the others about half.
"""

import sys
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageOps

from frugal.clipa.grid_masking import GridMasking
from frugal.cluster_masking.masking import ClusterMasking
from frugal.cluster_masking.pgs import PgsMasking
from frugal.common.randomness import SampleNoise
from frugal.common.reduction.image import PatchView
from frugal.common.reduction.random_masking import RandomMasking

PATCH, SIDE = 16, 224
HALF = (0.5, 0.5, 0.5)
METHODS = [
    RandomMasking(mask_ratio=0.5),
    GridMasking(window=2),
    ClusterMasking(target_mask_ratio=0.5),
    PgsMasking(threshold=None, target_mask_ratio=0.5),
]

picture, out = sys.argv[1:]
image = ImageOps.fit(Image.open(picture).convert("RGB"), (SIDE, SIDE))
pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, H, W)
view = PatchView(pixels, PATCH, mean=HALF, std=HALF)
noise = SampleNoise(seed=0, sample_numbers=torch.zeros(1, dtype=torch.int64))


def nearest_half(method):
    """The method with the threshold at which as near to half of the patches stays as can be."""
    found = [replace(method, threshold=threshold / 20) for threshold in range(1, 20)]
    away = lambda one: abs(one.keep(view, noise=noise).counts - view.num_patches // 2)  # noqa: E731
    return min(found, key=away)


shown = [pixels[0]]
for method in METHODS:
    if method.calibrated:  # a run looks for its threshold on its first images
        method = nearest_half(method)
    kept = method.keep(view, noise=noise)
    stays = kept.mask(view.num_patches).view(1, *view.grid)
    for side in (1, 2):
        stays = stays.repeat_interleave(PATCH, dim=side)  # (1, H, W)
    shown.append(pixels[0].where(stays, torch.tensor(60, dtype=torch.uint8)))
    print(f"{type(method).__name__}: {int(kept.counts)} of {view.num_patches} patches stay")
gap = torch.full((3, SIDE, 8), 255, dtype=torch.uint8)
row = torch.cat([part for one in shown for part in (one, gap)][:-1], dim=2)
Image.fromarray(row.permute(1, 2, 0).numpy()).save(out)
