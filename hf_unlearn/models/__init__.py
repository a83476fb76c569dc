"""Models: tasks, forward passes, layers, adapters, trainable parameters, fingerprints, loading."""
