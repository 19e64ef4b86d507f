"""Which caption fits a picture best: ``python examples/rank_captions.py MODEL PICTURE CAPTION...``.

MODEL is a run directory, or a folder or file of open_clip, transformers or OpenAI.
"""

import sys

import torch

from frugal.common import load_model

model, picture, *captions = sys.argv[1:]
bundle = load_model(model)
images = bundle.prepare([picture])  # (1, 3, H, W), as the model was trained to see them
token_ids, lengths = bundle.tokenize(captions)
with torch.inference_mode():
    image = bundle.model.encode_image(images)  # (1, E), of length 1
    texts = bundle.model.encode_text(token_ids, lengths)  # (C, E)
similarities = (texts @ image.T)[:, 0].tolist()
for similarity, caption in sorted(zip(similarities, captions, strict=True), reverse=True):
    print(f"{similarity:.3f}  {caption}")
