"""Trained nets, read back, and how good they are."""
