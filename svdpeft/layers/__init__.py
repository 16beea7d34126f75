"""One file per layer kind; a new file that registers a class is a new kind."""
