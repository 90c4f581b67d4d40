"""What earlier versions have left can be read."""

import shutil
from pathlib import Path

from conftest import DefaultRun, Run


def test_a_run_of_an_earlier_version_is_read_but_not_gone_on_with(
    default_run: DefaultRun, command: Run, tmp_path: Path
) -> None:
    """Its settings name classes that have moved since."""
    shutil.copytree(default_run.folder, tmp_path / "old")
    config = tmp_path / "old" / ".hydra" / "config.yaml"
    text = config.read_text()
    config.write_text(
        text.replace("mnist_lightning.callbacks.progress.Progress", "mnist_lightning.callbacks.Progress")
    )
    assert config.read_text() != text
    done = command("train", "resume=old", "trainer.max_epochs=20", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"{tmp_path / 'old'} can't be resumed: it was trained by an earlier version"
    )
    assert "mnist_lightning.callbacks.Progress is gone" in done.stderr
    assert len(done.stderr.splitlines()) == 1
