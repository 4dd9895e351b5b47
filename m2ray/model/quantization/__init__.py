"""The layouts in which quantised checkpoints come: a file a method."""
