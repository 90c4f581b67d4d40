"""A run's directory: what lies in it, and how it is written, found, read and gone on with."""
