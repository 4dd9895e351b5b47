"""What a machine does a second: a layer with random weights, the encoder and the store, each timed by itself."""
