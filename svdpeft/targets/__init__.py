"""From words to sites: what a model has to adapt, which of it is meant, and why the rest is left."""
