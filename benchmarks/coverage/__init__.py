"""Which weights of which networks are adapted: the sweep behind ``docs/coverage-*.md``."""
