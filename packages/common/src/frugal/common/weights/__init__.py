"""Models from anywhere and for anyone: runs, open_clip, OpenAI, transformers, timm."""
