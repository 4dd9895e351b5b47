"""Rows of a stage into parts, parts into commits, and who may write a run folder."""
