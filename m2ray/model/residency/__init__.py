"""Layers that are not kept as they are computed with: packed in some place, and unpacked just before they run."""
