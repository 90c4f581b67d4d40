"""Pages to work through: what they print when they run, and a project of one's own made of this one."""

import re
from pathlib import Path

import pytest
from conftest import REPOSITORY, Run

BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.M | re.S)
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
END = "--- end of a block ---"


def run_page(page: str, python: Run, cwd: Path) -> list[str]:
    """What each Python block of a page prints, which is what the page shows, but for the last digits."""
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


def test_from_scratch(python: Run, tmp_path: Path) -> None:
    """Gradients by hand are autograd's, and steps by hand are those of ``train``."""
    printed = run_page("docs/from_scratch.md", python, tmp_path)
    gradients, compared = printed[4], printed[-1]
    assert [float(one) < 1e-6 for one in re.findall(r"differs by (\S+)", gradients)] == [True] * 4
    (difference,) = re.findall(r"differs by at most (\S+)", compared)
    assert float(difference) <= 1e-4
    (answers,) = re.findall(r"that differ: (\d+)", compared)
    assert int(answers) <= 2
