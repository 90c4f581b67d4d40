from mnist_lightning.sweeps import processes


class ProcessesLauncher(processes.ProcessesLauncher):
    """The same launcher, in the package in which Hydra searches for plugins."""
