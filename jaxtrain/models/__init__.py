"""Image classifiers as tuples of Flax (Linen) layers. `registry.build` makes one by its name in the config."""
