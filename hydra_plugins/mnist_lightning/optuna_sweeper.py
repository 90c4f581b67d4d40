from mnist_lightning.sweeps import search


class OptunaSweeper(search.OptunaSweeper):
    """Where Hydra looks for it."""
