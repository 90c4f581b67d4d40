"""Read images from their sources, deform them, and prepare them for a net."""
