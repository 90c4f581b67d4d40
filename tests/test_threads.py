"""Tests of the number of threads, and that idle threads do not spin."""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Run, few
from torch import nn

from mnist_lightning import threads
from mnist_lightning.images.known import KNOWN
from mnist_lightning.network import FeedForward
from mnist_lightning.rundir.checkpoint import load

COMMANDS = ("train", "evaluate", "predict", "compare", "export", "visualize")


def make_net(*hidden: int, **more: object) -> FeedForward:
    return FeedForward(hidden, **more)  # type: ignore[arg-type]


def test_the_operations_of_a_net_are_those_of_its_matrix_products() -> None:
    assert threads.count_flops(make_net(256), KNOWN["mnist"].image_shape, 256) == 2 * 256 * (
        784 * 256 + 256 * 10
    )
    assert threads.count_flops(make_net(), KNOWN["mnist"].image_shape, 1) == 2 * 784 * 10


class Convolutions(nn.Module):
    """A user's own net, which draws random numbers even in eval mode and has two stages to count."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 8, kernel_size=5)
        self.linear = nn.Linear(8 * 24 * 24, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images + torch.rand(1)
        return self.linear(self.convolution(pixels).flatten(1))


def test_any_net_is_counted() -> None:
    of_an_image = 2 * (8 * 24 * 24 * 25 + 8 * 24 * 24 * 10)
    assert threads.count_flops(Convolutions(), KNOWN["mnist"].image_shape, 7) == 7 * of_an_image


def test_counting_changes_neither_the_net_nor_the_random_state() -> None:
    net = make_net(32, norm="batch", dropout=0.5, noise=0.3, input_noise=1.0)
    net.layers[2].eval()
    modes = [module.training for module in net.modules()]
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    for one in (net, Convolutions()):
        state = torch.get_rng_state()
        threads.count_flops(one, KNOWN["mnist"].image_shape, 4)
        assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


def test_the_step_decides_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = threads.usable_cores()
    default, strong = (
        3 * threads.count_flops(net, KNOWN["mnist"].image_shape, 256)
        for net in (make_net(256), make_net(1024, 1024))
    )
    assert threads.choose(default) == 1
    assert threads.choose(strong) == cores
    assert threads.choose(strong, processes=2 * cores) == 1
    assert threads.choose(default, wanted=3) == threads.choose(strong, wanted=3) == 3
    for limit, number in (("1", 1), (str(cores + 1), cores), ("1,2", 1), ("many", cores), ("0", cores)):
        monkeypatch.setenv("OMP_NUM_THREADS", limit)
        assert threads.choose(strong) == number, limit
        assert threads.choose(default) == 1


def test_the_number_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("5", None):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if variable:
            monkeypatch.setenv("OMP_NUM_THREADS", variable)
        before = torch.get_num_threads()
        with contextlib.suppress(RuntimeError), threads.use(before + 1):
            assert torch.get_num_threads() == before + 1
            assert os.environ["OMP_NUM_THREADS"] == str(before + 1)
            raise RuntimeError
        assert torch.get_num_threads() == before
        assert os.environ.get("OMP_NUM_THREADS") == variable


def test_training_in_this_process_puts_the_number_back(
    fit: Callable[..., dict[str, object]], tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    short = ("trainer.max_epochs=1", "+trainer.limit_train_batches=2", "logger=none")
    for folder, wanted in (("two", 2), ("null", "null")):
        metrics = fit(*short, f"threads={wanted}", folder=folder)
        assert metrics["threads"] == (2 if wanted == 2 else 1)
        checkpoint = load(tmp_path / folder / "checkpoints" / "last.ckpt")
        assert checkpoint["environment"]["num_threads"] == metrics["threads"]
        assert torch.get_num_threads() == before


@pytest.mark.linux("the affinity of a process")
def test_affinity_is_respected() -> None:
    code = (
        "import os; from mnist_lightning import threads\n"
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); print(threads.usable_cores())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "1\n"


CPU_V1 = Path("/sys/fs/cgroup/cpu")


@pytest.mark.linux("control groups")
@pytest.mark.parametrize(("quota", "cores"), [(50_000, 1), (150_000, 1), (200_000, 2), (-1, None)])
def test_a_containers_quota_is_respected(quota: int, cores: int | None) -> None:
    """The test makes a real control group if this process has the permission."""
    group = CPU_V1 / f"mnist_lightning-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text(str(quota))
    except OSError:
        pytest.skip("no control group can be made here")
    code = (
        "import os, pathlib, sys; from mnist_lightning import threads\n"
        "pathlib.Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid())); print(threads.usable_cores())"
    )
    try:
        told = subprocess.check_output([sys.executable, "-c", code, str(group)], text=True)
    finally:
        group.rmdir()
    assert int(told) == min(cores or 10**6, len(os.sched_getaffinity(0)))


@pytest.mark.linux("control groups")
def test_quotas_and_memory_of_version_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The files are those at the root of a container's own view."""
    monkeypatch.setattr(threads, "CGROUPS", tmp_path)
    for folder in {path for name in ("cpu", "memory") for path in threads.control_groups(name)}:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.max").write_text("max 100000\n")
    everything = len(os.sched_getaffinity(0))
    assert threads.usable_cores() == everything
    innermost = next(threads.control_groups("cpu"))
    (innermost / "cpu.max").write_text("50000 100000\n")
    assert next(threads.cpu_quotas()) == 0.5
    assert threads.usable_cores() == 1
    unlimited = threads.free_memory()
    innermost = next(threads.control_groups("memory"))
    (innermost / "memory.max").write_text("max\n")
    (innermost / "memory.current").write_text("700000000\n")
    (innermost / "memory.stat").write_text("anon 5\ninactive_file 300000000\nslab 7\n")
    assert threads.free_memory() == pytest.approx(unlimited, rel=0.5)
    (innermost / "memory.max").write_text("1000000000\n")
    assert threads.free_memory() == 600_000_000
    for content in ("", "half a core\n", "0 100000\n", "1 0\n"):
        (next(threads.control_groups("cpu")) / "cpu.max").write_text(content)
        assert threads.usable_cores() == everything, content


PROBE = """
import os, pathlib, sys
from hydra.plugins.search_path_plugin import SearchPathPlugin
text = f"{os.environ.get('OMP_WAIT_POLICY')} {os.environ.get('KMP_BLOCKTIME')} {'torch' in sys.modules}"
pathlib.Path("seen").write_text(text)
class Probe(SearchPathPlugin):
    def manipulate_search_path(self, search_path): pass
"""


@pytest.mark.parametrize("name", few(COMMANDS, 3))
def test_threads_wait_passively_before_hydra_loads_a_plugin(
    name: str, environment: dict[str, str], tmp_path: Path
) -> None:
    plugin = tmp_path / "path" / "hydra_plugins" / "probe" / "probe.py"
    plugin.parent.mkdir(parents=True)
    plugin.with_name("__init__.py").touch()
    plugin.write_text(PROBE)
    cases: list[tuple[dict[str, str], str]] = [({}, "PASSIVE 0 False")]
    if name == "train":
        cases += [
            ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None False"),
            ({"GOMP_SPINCOUNT": "9"}, "None None False"),
        ]
    for more, seen in cases:
        subprocess.run(
            [sys.executable, "-m", f"mnist_lightning.{name}", "--cfg", "job"],
            cwd=tmp_path,
            env=environment | {"PYTHONPATH": str(tmp_path / "path")} | more,
            check=True,
            capture_output=True,
        )
        assert (tmp_path / "seen").read_text() == seen


@pytest.mark.parametrize("name", few(COMMANDS, 3))
@pytest.mark.parametrize("value", ["0", "2000", "two"])
def test_wrong_numbers_are_told_in_a_line(name: str, value: str, command: Run, tmp_path: Path) -> None:
    needed = {"predict": ["images=x.png"], "compare": ["runs=[a,b]"]}.get(name, [])
    done = command(name, f"threads={value}", *needed, cwd=tmp_path)
    assert done.returncode == 1
    assert "threads" in done.stderr
    assert value in done.stderr
    assert "Traceback" not in done.stderr
    if value != "two":
        assert re.search(r"threads must be in \[1, 1024\], or null .*, got \d+", done.stderr)


@pytest.mark.linux("the affinity of a process")
@pytest.mark.slow
def test_the_default_net_is_the_same_whatever_the_number_of_cores(python: Run, tmp_path: Path) -> None:
    """Weights are equal to the bit; a large net uses all cores."""
    short = (
        "trainer.max_epochs=1",
        "+trainer.limit_train_batches=20",
        "logger=none",
        "callbacks.pictures=null",
        "data.val_size=500",
        "test=false",
    )
    cores = sorted(os.sched_getaffinity(0))

    def train(
        folder: str, allowed: list[int], *more: str
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        code = "import os, sys, runpy; os.sched_setaffinity(0, map(int, sys.argv.pop(1).split(',')));"
        code += "runpy.run_module('mnist_lightning.train', run_name='__main__', alter_sys=True)"
        arguments = (",".join(map(str, allowed)), f"hydra.run.dir={folder}", *short, *more)
        done = python("-c", code, *arguments, cwd=tmp_path, OMP_NUM_THREADS=str(len(cores)))
        assert done.returncode == 0, done.stderr
        metrics = json.loads((tmp_path / folder / "metrics.json").read_text())
        return load(tmp_path / folder / "checkpoints" / "last.ckpt")["state_dict"], metrics

    (one, metrics_of_one), (all_cores, metrics_of_all) = train("one", cores[:1]), train("all", cores)
    assert metrics_of_one["threads"] == metrics_of_all["threads"] == 1
    assert all(torch.equal(one[name], all_cores[name]) for name in one)
    _, metrics = train("large", cores, "model.hidden=[1024,1024]", "+trainer.limit_val_batches=1")
    assert metrics["threads"] == threads.usable_cores()
