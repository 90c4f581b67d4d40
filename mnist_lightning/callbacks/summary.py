"""Print a net's layers before it is trained."""

import logging

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import nn

log = logging.getLogger(__name__)


class NetSummary(Callback):
    """Print the net's layers and their numbers of parameters before training starts."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        net = pl_module.net
        assert isinstance(net, nn.Module)
        layers = [layer for layer in net.modules() if not list(layer.children())]
        for layer in layers:
            count = sum(parameter.numel() for parameter in layer.parameters())
            log.info("  %-60s %10s", layer, f"{count:,}" if count else "")
        log.info("  %-60s %10s", "parameters", f"{sum(p.numel() for p in net.parameters()):,}")
