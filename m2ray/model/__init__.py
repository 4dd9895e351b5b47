"""A transformers model cut into spans: checkpoints, exact loading, one span's forward pass, capture. No Ray."""
