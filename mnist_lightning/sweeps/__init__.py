"""Sweeps: what their jobs leave, and the reports made of it."""
