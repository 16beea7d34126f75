"""Comparisons: a grid of runs of many methods and seeds under one protocol, and its report."""
