"""Tests of pages to work through: their code prints what they show; and a renamed project works."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import REPOSITORY, Run

from docs import notebook

BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.M | re.S)
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
END = "--- end of a block ---"


def run_page(page: str, python: Run, cwd: Path) -> list[str]:
    """Run each Python block of a page, and check that it prints what the page shows, except for the last digits."""
    blocks = BLOCK.findall((REPOSITORY / page).read_text())
    (cwd / "page.py").write_text("".join(f"{code}\nprint({END!r})\n" for code, _ in blocks))
    done = python("page.py", cwd=cwd)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split(f"{END}\n")[:-1]
    assert len(printed) == len(blocks)
    for (_, shown), output in zip(blocks, printed, strict=True):
        if shown:
            assert NUMBER.sub("0", output) == NUMBER.sub("0", shown)
            for ours, theirs in zip(*(NUMBER.findall(text) for text in (output, shown)), strict=True):
                number, expected = (float(text.replace(",", "")) for text in (ours, theirs))
                assert number == pytest.approx(expected, rel=0.1, abs=1e-4), output
    return printed


@pytest.mark.slow
def test_from_scratch(python: Run, tmp_path: Path) -> None:
    """Gradients by hand equal autograd's, and steps by hand equal those of ``train``."""
    printed = run_page("docs/from_scratch.md", python, tmp_path)
    gradients, compared = printed[4], printed[-1]
    assert [float(one) < 1e-6 for one in re.findall(r"differs by (\S+)", gradients)] == [True] * 4
    (difference,) = re.findall(r"differ by at most (\S+)", compared)
    assert float(difference) <= 1e-4
    (same,) = re.findall(r"the same answer for (\S+) %", compared)
    assert float(same) >= 99.9


@pytest.mark.slow
def test_questions_have_answers(python: Run, tmp_path: Path) -> None:
    printed = run_page("docs/questions.md", python, tmp_path)
    page = (REPOSITORY / "docs" / "questions.md").read_text()
    assert len(re.findall("^## ", page, re.M)) == 16
    assert len(printed) > 16


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of this repository."""
    kept_aside = shutil.ignore_patterns(".*", "*cache*", "logs", "build", "dist")
    return Path(shutil.copytree(REPOSITORY, tmp_path / "clone", ignore=kept_aside))


def rename(clone: Path, name: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "docs/rename.py", name]
    return subprocess.run(command, cwd=clone, capture_output=True, text=True)


@pytest.mark.slow
def test_a_renamed_package_trains(clone: Path, environment: dict[str, str]) -> None:
    import torch

    done = rename(clone, "my_digits")
    assert done.returncode == 0, done.stderr
    for path in clone.rglob("*"):
        assert "mnist_lightning" not in path.name
        if path.is_file() and path.suffix != ".png":  # a figure names what has drawn it
            assert b"mnist_lightning" not in path.read_bytes().lower(), path
    assert 'my-digits-train = "my_digits.train:main"' in (clone / "pyproject.toml").read_text()
    settings = (
        "trainer.max_epochs=1",
        "+trainer.limit_train_batches=5",
        "hydra.run.dir=run",
        "model.hidden=8",
    )
    done = subprocess.run(
        [sys.executable, "-m", "my_digits.train", *settings],
        cwd=clone,
        env=environment | {"PYTHONPATH": str(clone)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "python -m my_digits.train" in done.stdout
    assert str(clone / "conf") in (clone / "run" / ".hydra" / "hydra.yaml").read_text()
    checkpoint = torch.load(clone / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["model"]["_target_"] == "my_digits.network.FeedForward"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("my-digits", "a package's name is lower-case letters, digits and _"),
        ("class", "a package's name is lower-case"),
        ("json", "there is a module or a folder of this name already"),
        ("tests", "there is a module or a folder of this name already"),
        ("--help", "usage: python docs/rename.py my_project"),
    ],
)
def test_a_bad_name_changes_nothing(name: str, told: str) -> None:
    done = rename(REPOSITORY, name)
    assert done.returncode == 1
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (REPOSITORY / "mnist_lightning" / "train.py").is_file()


def test_the_notebook_is_what_its_text_says() -> None:
    """The notebook has stored outputs, is small, and holds no path of the machine that ran it."""
    source = notebook.read_cells(notebook.SOURCE.read_text(encoding="utf-8"))
    stored = nbformat.read(notebook.NOTEBOOK, as_version=4)
    assert [(cell.cell_type, cell.source) for cell in stored.cells] == [
        (cell.cell_type, cell.source) for cell in source.cells
    ], "run: python docs/notebook.py"
    assert notebook.NOTEBOOK.stat().st_size <= 1_000_000
    assert len(list_pictures(stored)) == 7
    assert not re.search(r"/(home|root|tmp|work|Users|site-packages)/", read_printed(stored))


@pytest.mark.slow
def test_the_notebook_runs_from_a_wheel(tmp_path: Path, environment: dict[str, str], installed: Path) -> None:
    """The notebook runs in a new kernel, in an empty folder."""
    made = notebook.read_cells(notebook.SOURCE.read_text(encoding="utf-8"))
    made.cells.append(nbformat.v4.new_code_cell("import mnist_lightning\nprint(mnist_lightning.__file__)"))
    notebook.execute(made, tmp_path, environment | {"PYTHONPATH": str(installed)})
    printed = read_printed(made)
    assert printed.splitlines()[-1] == str(installed / "mnist_lightning" / "__init__.py")
    shares = [float(share) for share in re.findall(r"^(?:.* )?([\d.]+) %(?: of .*)?$", printed, re.M)]
    assert len(shares) > 4
    assert min(shares) > 90
    assert "read as 7" in printed
    assert len(list_pictures(made)) == 7
    assert len(list(tmp_path.glob("logs/train/runs/*/page.html"))) == 1


def list_pictures(made: "nbformat.NotebookNode") -> list[str]:
    outputs = [output for cell in made.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def read_printed(made: "nbformat.NotebookNode") -> str:
    outputs = [output for cell in made.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")
