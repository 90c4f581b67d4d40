from mnist_lightning.sweeps import search


class OptunaSweeper(search.OptunaSweeper):
    """The sweeper, in the package that Hydra searches for plugins."""
