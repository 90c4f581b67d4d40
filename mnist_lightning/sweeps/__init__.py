"""Run, resume and report sweeps."""
