"""Fixtures for all tests: commands in separate folders, a home for each worker's data, and shared runs."""

import os

# Set for this process, before torch is imported, and for all processes that the tests start:
os.environ["OMP_NUM_THREADS"] = "1"  # the workers of pytest-xdist share the cores
os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**30)  # glibc keeps and reuses memory; otherwise a
os.environ["MALLOC_TRIM_THRESHOLD_"] = str(2**30)  # short training spends a fifth of its time on it
os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # and asks for it in larger pieces

import compileall
import gc
import json
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict, read_write
from processes import FORKS, HEAVY, LIGHT, Fresh, Preloaded, Process

from mnist_lightning.config import CONF_DIR, Train, check, register

gc.set_threshold(20_000, 50, 100)  # the default would take a sixth of a short training

REPOSITORY = Path(__file__).parent.parent

LONG = ("test_sweeps.py", "test_train.py", "test_resume.py")  # start first, so that all workers end together

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
FLAGS += ["--disable-component-update", "--disable-sync"]

NO_PICTURES = "callbacks.pictures.enabled=false"  # they take longer than a short training

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[..., Process]
Open = Callable[..., Any]
Once = Callable[[str, Callable[[Path], None]], Path]


def pytest_configure(config: pytest.Config) -> None:
    """Let Python write bytecode; without it, each of hundreds of commands would compile all modules."""
    if not hasattr(config, "workerinput"):
        for package in ("mnist_lightning", "hydra_plugins", "benchmarks", "tests"):
            compileall.compile_dir(REPOSITORY / package, quiet=2)


def few(cases: Iterable[Any], every: int) -> list[Any]:
    """Mark all cases slow but each ``every``-th one: others that test the same with another value."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(*value, marks=pytest.mark.slow if number % every else [])
        for number, value in enumerate(values)
    ]


def pytest_xdist_auto_num_workers() -> int:
    """Return one more than the number of cores: tests often wait for a process, and a core would be idle."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
    for item in items:
        for name, is_here in (("posix", os.name == "posix"), ("linux", FORKS)):
            if not is_here and (mark := item.get_closest_marker(name)):
                item.add_marker(pytest.mark.skip(f"needs {mark.args[0]}, which only {name} has"))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder shared by all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    (folder / "shared").mkdir(exist_ok=True)
    return folder / "shared"


@pytest.fixture(scope="session")
def once(shared: Path) -> Once:
    """``once("name", make)`` returns a folder that ``make`` fills, once for all workers.

    Tests only read the folder; to change files, they copy it first.
    """

    def get(name: str, make: Callable[[Path], None]) -> Path:
        folder = shared / name
        with FileLock(shared / f"{name}.lock"):
            if not (shared / f"{name}.done").exists():
                shutil.rmtree(folder, ignore_errors=True)  # a failed attempt may have left it
                folder.mkdir()
                make(folder)
                (shared / f"{name}.done").touch()
        return folder

    return get


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> dict[str, str]:
    """Environment variables of processes: a separate home, so that the user's data is safe, and one thread."""
    import matplotlib

    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HYDRA", "PL_", "COV"))}
    return kept | {
        **dict.fromkeys(("HOME", "USERPROFILE"), str(tmp_path_factory.mktemp("home"))),
        "OMP_NUM_THREADS": "1",
        "MPLCONFIGDIR": matplotlib.get_cachedir(),  # otherwise listing the system's fonts takes seconds
        "TORCHINDUCTOR_CACHE_DIR": str(shared / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # otherwise a pool of processes imports torch
    }


@pytest.fixture(scope="session")
def preloaded(environment: dict[str, str]) -> Iterator[Preloaded]:
    interpreter = Preloaded(HEAVY, environment)
    yield interpreter
    assert interpreter.close() == "", "importing the heavy packages warns of nothing"


@pytest.fixture(scope="session")
def light(environment: dict[str, str]) -> Iterator[Preloaded]:
    """An interpreter that has imported Hydra, but nothing heavy."""
    interpreter = Preloaded(LIGHT, environment)
    yield interpreter
    assert interpreter.close() == ""


@pytest.fixture(scope="session")
def python(preloaded: Preloaded, environment: dict[str, str]) -> Run:
    """``python("-m", "mnist_lightning.train", cwd=folder, CXX="g++")`` runs Python in a fork of a process that
    has imported the heavy packages; ``CXX`` is an environment variable."""

    def run(*arguments: str, cwd: Path, **more: str) -> "subprocess.CompletedProcess[str]":
        return preloaded.start(*arguments, cwd=cwd, env=environment | more).finish()

    return run


@pytest.fixture(scope="session")
def command(python: Run) -> Run:
    """``command("train", "model.hidden=64", cwd=folder)`` runs a command in such a fork."""

    def run(name: str, *arguments: str, cwd: Path, **more: str) -> "subprocess.CompletedProcess[str]":
        return python("-m", f"mnist_lightning.{name}", *arguments, cwd=cwd, **more)

    return run


@pytest.fixture(scope="session")
def fresh_command(environment: dict[str, str]) -> Run:
    """Like ``command``, in a new interpreter, for tests of start-up and imports."""

    def run(name: str, *arguments: str, cwd: Path, **more: str) -> "subprocess.CompletedProcess[str]":
        process = Fresh("-m", f"mnist_lightning.{name}", *arguments, cwd=cwd, env=environment | more)
        return process.finish()

    return run


@pytest.fixture
def start(preloaded: Preloaded, environment: dict[str, str]) -> Iterator[Start]:
    """``start("train", "seed=1", cwd=folder)`` starts a command in a fork or in a ``fresh`` interpreter, and
    does not wait for its end.  Processes that are left at the end of the test are killed.  See
    ``Preloaded.start`` for other options."""
    started: list[Process] = []

    def begin(
        name: str,
        *arguments: str,
        cwd: Path,
        fresh: bool = False,
        heed_permissions: bool = False,
        file_size: int | None = None,
        **more: str,
    ) -> Process:
        whole, env = ("-m", f"mnist_lightning.{name}", *arguments), environment | more
        if fresh:
            started.append(Fresh(*whole, cwd=cwd, env=env))
        else:
            started.append(
                preloaded.start(
                    *whole, cwd=cwd, env=env, heed_permissions=heed_permissions, file_size=file_size
                )
            )
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def wheel(once: Once) -> Path:
    """The file of this checkout's wheel."""

    def make(folder: Path) -> None:
        build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPOSITORY))
        subprocess.run([sys.executable, *build], check=True, capture_output=True)

    return next(once("wheel", make).glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel: Path, once: Once) -> Path:
    """A folder with the unpacked wheel, which comes before the checkout on PYTHONPATH."""
    return once("installed", lambda folder: zipfile.ZipFile(wheel).extractall(folder))


@pytest.fixture
def from_wheel(installed: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make commands run the installed package, not the checkout."""
    monkeypatch.setitem(environment, "PYTHONPATH", str(installed))


@dataclass
class DefaultRun:
    """The result of ``python -m mnist_lightning.train`` without arguments."""

    folder: Path  # the run's folder
    logs: Path
    output: str
    errors: str
    returncode: int


@pytest.fixture(scope="session")
def default_run(fresh_command: Run, once: Once, environment: dict[str, str]) -> DefaultRun:
    def make(cwd: Path) -> None:
        done = fresh_command("train", cwd=cwd)
        (cwd.parent / "default.json").write_text(json.dumps([done.stdout, done.stderr, done.returncode]))

    cwd = once("default", make)
    unpack_mnist(environment)
    runs = list((cwd / "logs" / "train" / "runs").iterdir()) if (cwd / "logs").exists() else [cwd]
    return DefaultRun(runs[0], cwd / "logs", *json.loads((cwd.parent / "default.json").read_text()))


def unpack_mnist(environment: dict[str, str]) -> None:
    """Unpack MNIST in a worker's home, where training would; needed to read a run of another worker."""
    from mnist_lightning.images.sources import find_source

    find_source("mnist", Path(environment["HOME"], ".pytorch", "MNIST_data")).make_whole()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with MNIST, unpacked once for the tests that train in this process."""
    return tmp_path_factory.mktemp("data")


def settle(run_dir: Path, *overrides: str) -> Train:
    """Compose and check settings of a run in ``run_dir``, as the command does."""
    register()
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        cfg = compose("train", list(overrides), return_hydra_config=True)
    with read_write(cfg), open_dict(cfg):
        OmegaConf.update(cfg, "hydra.runtime.output_dir", str(run_dir))
    HydraConfig.instance().set_config(cfg)
    return check(cfg, Train)


@pytest.fixture
def fit(tmp_path: Path, data_dir: Path) -> Callable[..., dict[str, object]]:
    """``fit("model.hidden=64", folder="a")`` trains in this process, without pictures, and returns the content
    of ``metrics.json``."""
    from mnist_lightning.train import train

    def run(*overrides: str, folder: str = "run", test: bool = False) -> dict[str, object]:
        run_dir = tmp_path / folder
        run_dir.mkdir(exist_ok=True)
        settings = settle(run_dir, f"data.data_dir='{data_dir}'", *overrides)
        if pictures := settings.callbacks.get("pictures"):
            pictures["enabled"] = False
        if (film := settings.callbacks.get("film")) and "callbacks.film.enabled=true" not in overrides:
            film["enabled"] = False
        return dict(train(settings, run_dir, test=test))

    return run


@pytest.fixture(scope="session")
def trained_run(default_run: DefaultRun) -> Path:
    """The default run's folder, for tests of commands that read finished runs."""
    assert default_run.returncode == 0, default_run.errors
    return default_run.folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is not there: Debian's package chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


def check_nothing_leaves(page: Any) -> None:
    """Check that the open page's policy forbids requests to servers, also for images, and close the page."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        failed = page.evaluate("url => fetch(url).then(() => '', error => String(error))", url)
        assert "Failed to fetch" in failed
        page.evaluate("url => document.body.append(Object.assign(new Image(), {src: url}))", url)
        with pytest.raises(TimeoutError):
            server.accept()
    page.close()


@pytest.fixture
def show(browser: Any) -> Iterator[Open]:
    """``show(file)`` opens a page.  At the end, it must have made no other request and logged no error."""
    contexts, requests, complaints = [], [], []

    def show(file: Path, *, width: int = 1280, theme: str = "light", touch: bool = False) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=theme, has_touch=touch, offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(file.as_uri())
        return page

    yield show
    assert {url for url in requests if not url.startswith("file://")} == set()
    reading = "Canvas2D: Multiple readback"  # the tests do this, not the page
    assert [one for one in complaints if not one.startswith(reading)] == []
    for context in contexts:
        context.close()
