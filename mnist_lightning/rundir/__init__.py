"""Write, find, read and resume a run's folder."""
