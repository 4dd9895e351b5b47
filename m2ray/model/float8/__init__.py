"""`compute_dtype = "float8"`: weights stay FP8 as the files have them, and are multiplied with activations that are rounded to FP8."""

REMEDY = 'Set compute_dtype = "bfloat16".'
"""Wherever it cannot be."""
