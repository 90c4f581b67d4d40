from mnist_lightning.sweeps import processes


class ProcessesLauncher(processes.ProcessesLauncher):
    """The launcher, in the package that Hydra searches for plugins."""
