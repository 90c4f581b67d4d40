"""Make the pictures of the README and of docs/ anew, with the project's own commands.

TensorBoard is looked at in a real browser: chromium, which must be installed.

    python docs/pictures.py
"""

import io
import itertools
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).parent.parent
IMAGES = REPOSITORY / "docs" / "images"
EXPLAINED = 9587  # of the test images: a 9 that the default net reads as 4
SEVEN = [(0.3, 0.25), (0.5, 0.22), (0.7, 0.25), (0.6, 0.45), (0.5, 0.65), (0.42, 0.85)]  # of the page's field
THREE = [(0.33, 0.2), (0.5, 0.13), (0.66, 0.2), (0.64, 0.36), (0.48, 0.46)]
THREE += [(0.66, 0.58), (0.68, 0.76), (0.5, 0.86), (0.32, 0.78)]
EIGHT = [(0.32, 0.78), (0.31, 0.62), (0.48, 0.46), (0.31, 0.34), (0.33, 0.2)]  # what makes an 8 of that 3
DIGIT = 7  # of the test images, the one that is "photographed" for predict: a 9
BROWSER = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
NUM_COLORS = 128  # of a palette, which keeps the files small


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        cwd = Path(name)
        run(cwd, "train", "hydra.run.dir=logs/train/runs/default")
        run(cwd, "visualize")
        run(cwd, "evaluate")
        photograph(cwd / "photo.png")
        run(cwd, "predict", "images=photo.png", "output=read")
        run(
            cwd,
            *("train", "-m", "model.hidden=64,256", "optimizer.lr=1e-3,4e-3,1e-2"),
            "hydra.sweep.dir=logs/train/multiruns/sweep",
        )
        evaluation = cwd / "logs/train/runs/default/evaluation/test"
        keep(cwd / "read/001_photo.png", "predict.png")
        keep(cwd / "logs/visualize/mnist/images.png", "digits.png")
        keep(evaluation / "mistakes.png", "mistakes.png")
        keep(evaluation / "confusion_matrix.png", "confusion_matrix.png")
        run(cwd, "explain", f"index={EXPLAINED}", "run=logs/train/runs/default", "output=why")
        keep(cwd / f"why/001_test {EXPLAINED}.png", "explain.png")
        run(cwd, "visualize", "film=logs/train/runs/default", "output=filmed")
        shutil.copy(cwd / "filmed/film.gif", IMAGES)
        run(cwd, "train", "debug=lr_range", "hydra.run.dir=range")
        keep(cwd / "range/lr_range.png", "lr_range.png")
        run(cwd, "export", "format=html", "film=true", "run=logs/train/runs/default", "output=page.html")
        photograph_page(cwd / "page.html", cwd)
        film_drawing(cwd / "page.html")
        with tensorboard(cwd, "logs/train/runs") as url:
            screenshot(cwd, f"{url}#scalars&_smoothingWeight=0", "curves.png", height=460)
        with tensorboard(cwd, "logs/train/multiruns") as url:
            screenshot(cwd, f"{url}#hparams", "hparams.png", height=460)


def run(cwd: Path, command: str, *arguments: str) -> None:
    print("python -m", f"mnist_lightning.{command}", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", f"mnist_lightning.{command}", *arguments], cwd=cwd, check=True)


def photograph(path: Path) -> None:
    """A test digit as a pen on paper under a lamp, as in ``benchmarks/handwriting.py``."""
    from torchvision.datasets import MNIST

    sys.path.insert(0, str(REPOSITORY))
    from benchmarks.handwriting import photographed

    digits = MNIST(str(Path("~/.pytorch/MNIST_data/").expanduser()), train=False).data
    photographed(digits[DIGIT].numpy(), np.random.default_rng(0)).save(path)


def photograph_page(page_file: Path, cwd: Path) -> None:
    """The page of ``export format=html``, a 7 drawn on it: on a wide screen, on a phone and its film."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=BROWSER)
        for name, width, height, theme in (
            ("page.png", 1280, 1040, "light"),
            ("page_phone.png", 390, 1500, "dark"),
            ("page_film.png", 768, 900, "light"),
        ):
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
            page.goto(page_file.as_uri())
            box = page.locator("#field").bounding_box()
            places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in SEVEN]
            page.mouse.move(*places[0])
            page.mouse.down()
            for place in places[1:]:
                page.mouse.move(*place, steps=5)
            page.mouse.up()
            page.wait_for_timeout(200)
            page.locator("#bars button").nth(7).click()
            page.evaluate(
                "picked = {layer: 0, unit: seen.passes[0].values.indexOf(Math.max(...seen.passes[0].values))}"
            )
            page.evaluate("film.moment = 25; showMoment(); showUnits(); scrollTo(0, 0)")
            target = page.locator("#film") if "film" in name else page
            target.screenshot(path=cwd / name)
            keep(cwd / name, name)
        browser.close()


def film_drawing(page_file: Path) -> None:
    """``draw.gif``: a 3 is drawn on the page and made an 8, and the answer follows."""
    from playwright.sync_api import sync_playwright

    frames: list[Image.Image] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=BROWSER)
        page = browser.new_page(viewport={"width": 1100, "height": 690}, color_scheme="light")
        page.goto(page_file.as_uri())
        box = page.locator("#field").bounding_box()

        def film() -> None:
            page.wait_for_timeout(100)
            frame = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            frames.append(frame.resize((800, frame.height * 800 // frame.width), Image.Resampling.LANCZOS))

        film()
        for stroke in (THREE, EIGHT):
            places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]
            page.mouse.move(*places[0])
            page.mouse.down()
            for start, end in itertools.pairwise(places):
                for share in (1 / 3, 2 / 3, 1):
                    page.mouse.move(*(a + share * (b - a) for a, b in zip(start, end, strict=True)))
                    film()
            page.mouse.up()
        browser.close()
    drawn = 3 * (len(THREE) - 1)
    pauses = [1200 if number in (0, drawn, len(frames) - 1) else 90 for number in range(len(frames))]
    frames, pauses = [frames[-1], *frames[:-1]], [pauses[-1], *pauses[:-1]]  # where it stands still, an 8
    palette = frames[0].quantize(NUM_COLORS, dither=Image.Dither.NONE)
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    first.save(IMAGES / "draw.gif", save_all=True, append_images=others, duration=pauses, loop=0)


def keep(path: Path, name: str) -> None:
    """The picture as a PNG with a palette: a third of its size, no difference to the eye."""
    picture = Image.open(path).convert("RGB").quantize(NUM_COLORS, dither=Image.Dither.NONE)
    picture.save(IMAGES / name, optimize=True)
    print(f"  {name}: {(IMAGES / name).stat().st_size / 1000:.0f} kB")


@contextmanager
def tensorboard(cwd: Path, logdir: str) -> Iterator[str]:
    """TensorBoard's address, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logdir, "--port", str(port)]
    server = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while urlopen(f"{url}data/runs") in (None, b"[]"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"TensorBoard shows no run of {logdir}")
            time.sleep(0.5)
        time.sleep(5)  # it reads the event files one after the other
        yield url
    finally:
        server.terminate()
        server.wait()


def urlopen(url: str) -> bytes | None:
    try:
        with urllib.request.urlopen(url) as answer:
            content: bytes = answer.read()
            return content.strip()
    except OSError:
        return None


def screenshot(cwd: Path, url: str, name: str, *, height: int, width: int = 1100) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise FileNotFoundError("chromium is not installed")
    subprocess.run(
        [
            browser,
            "--headless",
            *BROWSER,
            f"--user-data-dir={cwd / 'browser'}",
            "--virtual-time-budget=30000",  # milliseconds of the page's own clock
            f"--window-size={width},{height}",
            f"--screenshot={cwd / name}",
            url,
        ],
        check=True,
        capture_output=True,
    )
    keep(cwd / name, name)


if __name__ == "__main__":
    main()
