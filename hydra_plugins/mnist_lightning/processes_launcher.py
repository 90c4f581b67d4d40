from mnist_lightning.sweeps import processes


class ProcessesLauncher(processes.ProcessesLauncher):
    """Where Hydra looks for it."""
