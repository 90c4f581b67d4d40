from mnist_lightning.sweeps import search


class OptunaSweeper(search.OptunaSweeper):
    """The same sweeper, in the package in which Hydra searches for plugins."""
