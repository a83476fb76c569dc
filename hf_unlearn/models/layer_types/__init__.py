"""The layer types that the package knows: each module registers those of one kind (`layers.register_layer`)."""
