from mnist_lightning.sweeps import grid


class GridSweeper(grid.GridSweeper):
    """The same sweeper, in the package in which Hydra searches for plugins."""
