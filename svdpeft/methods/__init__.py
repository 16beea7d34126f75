"""One file per method; a new file that registers a class is a new method."""
