"""Write a net's page again and again while the net learns."""

import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback

from mnist_lightning.callbacks.film import FilmCallback
from mnist_lightning.evaluation.trained import compute_outputs
from mnist_lightning.images.known import draws_like_mnist
from mnist_lightning.network import on_trial
from mnist_lightning.page.build import NotDrawable, choose_samples, make_page, read_layers
from mnist_lightning.rundir.atomic import write_atomic
from mnist_lightning.rundir.film import pack_film

log = logging.getLogger(__name__)

NUM_ASKED = 1_000  # images from which the page's samples are chosen


class WatchPage(Callback):
    """Write ``page.html`` before training and at the end of each epoch, with the film so far.

    The open page reloads itself and keeps the user's drawing; the last version, written when training ends,
    does not reload.

    Args:
        path: the file to write.
    """

    def __init__(self, *, path: str) -> None:
        self.path = Path(path)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the page can run the net.

        Raises:
            MisconfigurationException: the page's script can't run the net.
        """
        try:
            read_layers(pl_module)  # type: ignore[arg-type]
        except NotDrawable as error:
            raise MisconfigurationException(f"watch=true: {error}") from error

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module, live=True)
        if trainer.is_global_zero:
            log.info("watch: open %s in a browser", self.path)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module, live=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module, live=False)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if self.path.exists():
            self._write(trainer, pl_module, live=False)

    def _write(self, trainer: L.Trainer, classifier: Any, *, live: bool) -> None:
        if not trainer.is_global_zero:
            return
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        split = datamodule.splits["val" if len(datamodule.splits["val"]) else "train"]
        images, labels = split.images[:NUM_ASKED], split.labels[:NUM_ASKED]
        films = [one.develop() for one in trainer.callbacks if isinstance(one, FilmCallback)]  # type: ignore[attr-defined]
        film = next((pack_film(film) for film in films if film is not None), None)
        with on_trial(classifier):
            probabilities = compute_outputs(classifier, images).softmax(dim=1)
            chosen = choose_samples(probabilities, labels, classifier.image_shape)
            content = make_page(
                classifier,
                title=f"A net for {datamodule.name}",
                about=f"after {trainer.global_step:,} steps" + (", and it goes on" if live else ""),
                samples=(images[chosen], labels[chosen], probabilities[chosen].argmax(dim=1)),
                handwriting=draws_like_mnist(datamodule.hparams),
                film=film,
                live=time.time() if live else 0.0,
            )
        try:
            write_atomic(self.path, content)
        except OSError as error:  # training continues without the page
            log.warning("the page can't be written: %s", error)
