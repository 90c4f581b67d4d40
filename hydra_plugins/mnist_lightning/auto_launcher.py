from mnist_lightning.sweeps import auto


class AutoLauncher(auto.AutoLauncher):
    """The launcher, in the package that Hydra searches for plugins."""
