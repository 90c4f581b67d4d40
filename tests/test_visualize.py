import gzip
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from PIL import Image

from mnist_lightning.images.sources import PACKAGED, RAW_FILES

FIGURES = ["class_counts.png", "images.png", "mean_images.png", "pixels.png"]


def test_visualize_draws_mnist(tmp_path: Path, command: Run) -> None:
    done = command("visualize", "output=my (1) pictures, é", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    folder = tmp_path / "my (1) pictures, é"
    assert sorted(path.name for path in folder.iterdir()) == [".written", *FIGURES]
    for name in FIGURES:
        with Image.open(folder / name) as picture:
            assert picture.size[0] == 960
            assert np.asarray(picture.convert("L")).std() > 10
    assert "55,000 train, 5,000 val, 10,000 test images" in done.stdout
    assert "mean 0.1307 and std 0.3081" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]  # no outputs/


@pytest.mark.slow
def test_deformations_are_drawn_where_there_are_some(tmp_path: Path, command: Run) -> None:
    done = command("visualize", "data.augment.rotation=20", "output=pictures", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "pictures" / "augmented.png") as picture:
        assert picture.size[0] == 960
        assert np.asarray(picture.convert("L")).std() > 10


@pytest.mark.slow
def test_visualize_takes_data_of_the_same_format(tmp_path: Path, command: Run) -> None:
    """Reversed MNIST images stand for Fashion-MNIST, which can't be downloaded without a network."""
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in RAW_FILES:
        content = gzip.decompress((PACKAGED / f"{name}.gz").read_bytes())
        header = 16 if "images" in name else 8
        body = np.frombuffer(content, np.uint8, offset=header)
        changed = 255 - body if header == 16 else body
        (raw / name).write_bytes(content[:header] + changed.tobytes())
    arguments = ["data=fashion_mnist", f"data.data_dir={tmp_path / 'data'}", "data.val_size=0"]
    done = command("visualize", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "logs/visualize/fashion_mnist").iterdir()) == FIGURES
    assert "fashion_mnist: 60,000 train, 10,000 test images" in done.stdout
    assert "mean 0.8693" in done.stdout


def test_a_wrong_setting_is_told_in_a_line(tmp_path: Path, command: Run) -> None:
    done = command("visualize", "data.val_size=60000", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.startswith("data.val_size must be in [0, 59999], got 60000")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_first_start_tells_nothing_of_fonts(tmp_path: Path, fresh_command: Run) -> None:
    """At the first start, matplotlib makes a list of fonts."""
    fonts = tmp_path / "fonts"
    done = fresh_command("visualize", "output=pictures", cwd=tmp_path, MPLCONFIGDIR=str(fonts))
    assert done.returncode == 0, done.stderr
    assert list(fonts.glob("fontlist*.json"))
    assert "font" not in done.stdout + done.stderr
