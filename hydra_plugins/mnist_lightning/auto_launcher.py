from mnist_lightning.sweeps import auto


class AutoLauncher(auto.AutoLauncher):
    """The same launcher, in the package in which Hydra searches for plugins."""
