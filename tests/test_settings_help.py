"""--help shows the comments in conf/."""

from pathlib import Path

import pytest
from conftest import Run

from mnist_lightning.config import CONF_DIR
from mnist_lightning.settings_help import read_comments


@pytest.mark.parametrize(
    "name", ["train", "evaluate", "predict", "compare", "export", "visualize", "report", "runs"]
)
def test_help_tells_what_each_setting_means(name: str, command: Run, tmp_path: Path) -> None:
    """It shows each line of conf/<command>.yaml and of the chosen files, with its comment."""
    needed = ["model.dropout=0.3", "optimizer=sgd"] if name == "train" else []
    done = command(name, "--help", *needed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    files = {"": f"{name}.yaml"}
    if name == "train":
        files |= {
            "model.": "model/mlp.yaml",
            "optimizer.": "optimizer/sgd.yaml",
            "trainer.": "trainer/default.yaml",
        }
        assert "model.dropout=0.3 probability of setting a hidden unit to 0" in told
        assert "optimizer.momentum=0.9" in told
    for prefix, file in files.items():
        comments = read_comments(Path(CONF_DIR) / file)
        assert comments
        for key, comment in comments.items():
            assert f"{prefix}{key}=" in told or "." not in prefix + key, key
            assert comment in told, comment
