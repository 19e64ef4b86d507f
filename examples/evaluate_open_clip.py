"""Zero-shot accuracy of a model: ``python examples/evaluate_open_clip.py MODEL DATA``.

MODEL is whatever ``load_model`` takes, such as a folder that open_clip wrote; DATA class folders,
ImageNet, tars in clip_benchmark's layout, or scenes.
"""

import sys
from pathlib import Path

from frugal.common import load_model
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.run import open_run

model, data = sys.argv[1:]
bundle = load_model(model)
numbers = ZeroShot(data=Path(data)).evaluate(bundle, open_run(Path(), "auto"))
for name, value in numbers.items():
    print(f"{name}: {value:.4g}")
