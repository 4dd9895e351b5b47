"""A run folder into rows: opened, streamed, drawn at random, verified."""
