from mnist_lightning.sweeps import auto


class AutoLauncher(auto.AutoLauncher):
    """Where Hydra looks for it."""
