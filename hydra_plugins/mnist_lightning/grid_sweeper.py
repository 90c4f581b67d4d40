from mnist_lightning.sweeps import grid


class GridSweeper(grid.GridSweeper):
    """The sweeper, in the package that Hydra searches for plugins."""
