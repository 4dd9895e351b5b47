"""How tensors lie packed in quantised checkpoints, a file a method; `layouts.py` is the table of them."""
