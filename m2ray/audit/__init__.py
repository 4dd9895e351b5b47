"""Rows held against transformers itself: a random sample of a run, computed again without the code that made it."""
