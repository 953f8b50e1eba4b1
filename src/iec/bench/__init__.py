"""Comparisons: several ways to sample the same seeds, side by side."""
