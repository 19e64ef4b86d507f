"""Transfer learning of any image tower: fine-tuning, linear probing, semantic segmentation.

Each is a recipe's parts: model, data, objective and the evaluation that measures it. Named recipes
are the method packages'.
"""
