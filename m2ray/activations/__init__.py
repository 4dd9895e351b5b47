"""The sink: activations out of a stage into a run folder, and out of the folder into tensors again."""
