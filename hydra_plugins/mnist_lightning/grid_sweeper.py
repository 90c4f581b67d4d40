from mnist_lightning.sweeps import grid


class GridSweeper(grid.GridSweeper):
    """Where Hydra looks for it."""
