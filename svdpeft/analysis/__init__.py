"""Spectral analysis of weights and of training."""
