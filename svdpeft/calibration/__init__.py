"""One pass over data, and what it saw of every site, for the methods that start from data."""
