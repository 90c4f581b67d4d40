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
        counts = [(str(layer), sum(weights.numel() for weights in layer.parameters())) for layer in layers]
        one_line = [len(text) for text, _ in counts if "\n" not in text]  # a ParameterList has many lines
        width = max([60, *one_line])
        for text, count in counts:
            log.info("  %-*s %10s", width, text, f"{count:,}" if count else "")
        log.info("  %-*s %10s", width, "parameters", f"{sum(p.numel() for p in net.parameters()):,}")
