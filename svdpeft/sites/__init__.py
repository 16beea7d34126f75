"""One adapted weight, and the two ways its update reaches the output: of a layer that is called, or that is read."""
