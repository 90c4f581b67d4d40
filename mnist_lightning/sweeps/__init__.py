"""Sweeps: what their jobs leave, and what is told of them."""
