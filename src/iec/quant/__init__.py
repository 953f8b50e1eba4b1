"""Quantized layers: which ones, observed how, and the kernels that compute them."""
