"""One training from a model's name to an adapter on disk: what ``svdpeft train`` and every run of a comparison do."""
