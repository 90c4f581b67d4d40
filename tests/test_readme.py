"""The README and docs/ are true: commands run, quoted code equals the source, and links have a target."""

import functools
import json
import re
import shlex
import shutil
import textwrap
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import NO_PICTURES, REPOSITORY, Once, Run, few, settle, unpack_mnist
from PIL import Image, ImageDraw
from processes import Fresh, wait_for

from docs import reference
from mnist_lightning.config import SCHEMAS

GUIDES = sorted(
    path.relative_to(REPOSITORY)
    for folder in (REPOSITORY, REPOSITORY / "docs", REPOSITORY / "docs" / "images", REPOSITORY / "benchmarks")
    for path in folder.glob("*.md")
)
# Pages whose commands use the files that the pages write; test_make_it_yours tests them together
CHANGES, CASE_STUDY = Path("docs/make_it_yours.md"), Path("docs/case_study.md")
TRAIN = "python -m mnist_lightning.train"
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.M | re.S
)
# Commands that no test can run unchanged, and why.  A code block is marked in the guide itself.
NOT_RUN = {
    "pip ": "needs the network",
    "tensorboard ": "a server that does not end: test_tensorboard_serves_a_run",
    "python docs/reference.py": "writes into the repository: test_the_reference_is_what_the_configs_say",
    "python docs/pictures.py": "needs a browser, and writes into the repository",
    "python docs/notebook.py": "writes into the repository: test_the_notebook_is_what_its_text_says",
}
# Commands that need the network or other hardware are composed and checked, but not run.
# test_ddp_gives_the_metrics_of_one_process starts trainer=ddp.
ONLY_COMPOSED = re.compile(
    r"data=(fashion_mnist|kmnist|emnist|cifar10)|trainer=(gpu|ddp)|accelerator=gpu|num_nodes="
)
PLAIN = re.compile(
    r"(model|data|optimizer|scheduler|experiment|callbacks)[=.]|(seed|logger|trainer\.max_epochs)="
)
SHORT = (
    *("trainer.max_epochs=1", "+trainer.limit_train_batches=2"),
    *("++trainer.limit_val_batches=2", "++trainer.limit_test_batches=2"),
)


class Fence(NamedTuple):
    mark: str  # the comment before the block
    language: str
    body: str


def read(guide: Path) -> str:
    return (REPOSITORY / guide).read_text()


def fences(guide: Path) -> list[Fence]:
    return [Fence(m["mark"] or "", m["language"], m["body"]) for m in FENCE.finditer(read(guide))]


def commands(guide: Path) -> Iterator[str]:
    """Return the commands in shell blocks and inline code, where "… key=value" stands for the train command."""
    text = read(guide)
    for fence in fences(guide):
        if fence.language == "bash" and not fence.mark.startswith("not run: "):
            for line in fence.body.replace("\\\n", " ").splitlines():
                if command := line.partition("  #")[0].strip():
                    yield command
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCE.sub("", text)):
        if re.match(r"… (-m |--)?[\w/.+~]+(=|$)", code):
            yield code.replace("…", TRAIN, 1)
        elif (
            code.startswith(("python ", "tensorboard ", "pip ")) and "<" not in code
        ):  # a pattern, not a command
            yield code


COMMANDS = {
    command: guide
    for guide in reversed(GUIDES)
    if guide not in (CHANGES, CASE_STUDY)
    for command in commands(guide)
    if not command.startswith(tuple(NOT_RUN))
}


def shorten(command: str) -> list[str]:
    """Return the command's arguments after ``python``, with settings that make a training short."""
    arguments = shlex.split(command.replace("…", "_"))[1:]
    if arguments[0] != "-m":
        return [str(REPOSITORY / arguments[0]), "--help"]  # the benchmarks themselves take minutes
    if arguments[1].startswith("benchmarks."):
        return [*arguments[:2], "--help"]
    if arguments[1] == "mnist_lightning.explain":
        arguments = [re.sub("^mistakes=.*", "mistakes=2", argument) for argument in arguments]
    if "--help" in arguments or arguments[1] != "mnist_lightning.train":
        return [*arguments, "--cfg", "job"] if ONLY_COMPOSED.search(command) else arguments
    if ONLY_COMPOSED.search(command):
        return [*(argument for argument in arguments if argument != "--cfg"), "--cfg", "job"]
    if "resume=" in command or "--cfg" in arguments:
        return arguments
    short = list(SHORT)
    if re.search(r"experiment=(permutation|record|strong)", command):  # test_train trains these nets
        short.append("model.hidden=[64,64]")
    if "pictures" not in command and len(arguments) > 2:  # the plain command draws them
        short.append(NO_PICTURES)
    if "experiment=fast" in command:
        short.remove(NO_PICTURES)
    if "search=mlp" in command:
        short.append("hydra.sweeper.n_trials=2")
    elif "-m" in arguments[2:]:
        arguments = fewer(arguments)
    return [*arguments, *short]


def fewer(arguments: list[str]) -> list[str]:
    """Shorten a sweep to two values of the first swept key and one value of each other key."""
    swept = [argument for argument in arguments if re.fullmatch(r"[\w.]+=[^\[(]+,.+", argument)]
    keep = {argument: 2 if argument == swept[0] else 1 for argument in swept}
    return [",".join(argument.split(",")[: keep.get(argument)]) for argument in arguments]


@pytest.fixture(scope="session")
def workplace(
    python: Run, once: Once, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with everything that the guides' commands name: a run, a sweep, checkpoints and pictures.

    The commands write to it, so each worker has its own copy.  Commands that train use another copy
    (``elsewhere``), so that the newest run does not depend on the order of the tests."""

    def make(cwd: Path) -> None:
        for arguments in (["hydra.run.dir=A"], ["-m", "seed=1,2", "hydra.sweep.dir=sweep"]):
            done = python("-m", "mnist_lightning.train", *arguments, *SHORT, cwd=cwd)
            assert done.returncode == 0, done.stderr

    cwd = tmp_path_factory.mktemp("reader")
    shutil.copytree(once("reader", make), cwd, dirs_exist_ok=True)
    shutil.copytree(cwd / "A", cwd / "B")
    shutil.copytree(cwd / "A", cwd / "C")
    shutil.copy(cwd / "A" / "checkpoints" / "best.ckpt", cwd)
    shutil.copy(cwd / "A" / "checkpoints" / "best.ckpt", cwd / "checkpoint.ckpt")
    (cwd / "photos").mkdir()
    for name in ("my_digit.png", "photo.png", "one.png", "two.jpg", "photos/seven.png"):
        picture = Image.new("L", (200, 200), 240)
        ImageDraw.Draw(picture).line([(60, 50), (140, 50), (90, 160)], fill=20, width=14)
        picture.save(cwd / name)
    for guide in GUIDES:
        for kind, name in re.findall(r"logs/train/(runs|multiruns)/([\w-]+)", read(guide)):
            folder = cwd / "logs" / "train" / kind / name
            if not folder.exists():
                shutil.copytree(cwd / ("A" if kind == "runs" else "sweep"), folder)
    shutil.copytree(cwd / "A", cwd / "logs" / "train" / "runs" / "newest")
    for path in (cwd / "logs" / "train" / "runs" / "newest" / "checkpoints").iterdir():
        path.touch()
    shutil.copytree(cwd, elsewhere(cwd))
    unpack_mnist(environment)
    return cwd


def elsewhere(workplace: Path) -> Path:
    return workplace.with_name(f"{workplace.name}-trains")


def is_plain(command: str) -> bool:
    """Tell whether a command only trains another net, optimizer and so on, as many other commands do."""
    arguments = shlex.split(command.replace("…", "_"))[3:]
    return command.startswith(TRAIN) and bool(arguments) and all(map(PLAIN.match, arguments))


@pytest.mark.parametrize("command", few([command for command in COMMANDS if is_plain(command)], 3))
def test_plain_commands_are_right(command: str, tmp_path: Path) -> None:
    """The commands are composed and checked; ``test_commands_run`` trains, which takes long."""
    settings = settle(tmp_path, *shlex.split(command.replace("…", "_"))[3:])
    assert settings.model["hidden"]


def is_slow(command: str) -> bool:
    """Tell whether a command is a sweep, or one of many: each module has one that is run more often."""
    alike = [one for one in COMMANDS if one.split()[:3] == command.split()[:3] and not is_plain(one)]
    return is_plain(command) or command.startswith(f"{TRAIN} -m ") or command not in alike[:1]


@pytest.mark.parametrize(
    "command", [pytest.param(one, marks=pytest.mark.slow) if is_slow(one) else one for one in COMMANDS]
)
def test_commands_run(command: str, python: Run, workplace: Path) -> None:
    trains = command.startswith(TRAIN) and SHORT[0] in shorten(command)
    done = python(*shorten(command), cwd=elsewhere(workplace) if trains else workplace)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert output
    if trains:
        assert "everything is in" in output or "the report is in" in output


def test_most_commands_are_really_run() -> None:
    trainings = [command for command in COMMANDS if "limit_train_batches" in " ".join(shorten(command))]
    assert len(trainings) > 20
    assert len(COMMANDS) > 35


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        (lines[0].removeprefix("$ "), lines[1:])
        for guide in GUIDES
        for fence in fences(guide)
        if fence.language == "console"
        for lines in [fence.body.splitlines()]
    ],
)
def test_commands_print_what_is_shown(command: str, printed: list[str], python: Run, workplace: Path) -> None:
    done = python(*shlex.split(command)[1:], cwd=workplace)
    assert done.returncode == 1, "what is shown so far are errors"
    assert (done.stdout + done.stderr).splitlines() == printed


def test_the_first_page_shows_what_a_run_prints(command: Run, workplace: Path) -> None:
    """The output is the same line by line, except for the numbers."""
    shown = next(fence.body for fence in fences(Path("README.md")) if "test accuracy" in fence.body)
    short = "+trainer.limit_train_batches=2"
    done = command("train", short, cwd=elsewhere(workplace))
    # "next:" repeats the typed command with one more argument
    output = (done.stdout + done.stderr).replace(f"{short} ", "")
    assert done.returncode == 0, output

    def forms(text: str) -> list[str]:
        return [
            re.sub(r"\d+", "0", re.sub(r"logs/\S+", "FOLDER", line)).strip() for line in text.splitlines()
        ]

    assert forms(shown) == forms(output)[-len(forms(shown)) :]


def test_tensorboard_serves_a_run(workplace: Path, environment: dict[str, str]) -> None:
    """``tensorboard --logdir logs`` answers the requests that a browser sends."""
    server = Fresh(
        *("-m", "tensorboard.main", "--logdir", "logs", "--port", "0"), cwd=workplace, env=environment
    )

    def read_runs() -> list[str]:
        (url,) = re.findall(r"http://\S+", server.stderr)
        runs: list[str] = json.load(urllib.request.urlopen(f"{url}data/runs"))
        return runs

    try:
        wait_for(lambda: re.search(r"http://\S+ ", server.stderr) is not None, server)
        wait_for(lambda: bool(read_runs()), server, pause=0.2)
        runs = read_runs()
    finally:
        server.terminate()
        server.wait()
    assert all("tensorboard" in run.split("/") for run in runs)


@functools.cache
def windows(path: Path, count: int) -> set[str]:
    """Return all blocks of ``count`` lines of a file, without their common indentation."""
    lines = path.read_text().splitlines()
    return {
        textwrap.dedent("\n".join(lines[start : start + count])) for start in range(len(lines) - count + 1)
    }


QUOTES = [
    (guide, fence.mark.removeprefix("source: "), fence.body.rstrip("\n"))
    for guide in GUIDES
    for fence in fences(guide)
    if fence.mark.startswith("source: ")
]


@pytest.mark.parametrize(
    ("guide", "source", "quote"), QUOTES, ids=[f"{source}-{n}" for n, (_, source, _) in enumerate(QUOTES)]
)
def test_quotes_are_the_source(guide: Path, source: str, quote: str) -> None:
    assert textwrap.dedent(quote) in windows(REPOSITORY / source, len(quote.splitlines()))


def anchors(guide: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", read(guide)), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


LINKS = sorted(
    {
        (str(guide), link)
        for guide in GUIDES
        for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", read(guide)))
        if not link.startswith("http")
    }
)


@pytest.mark.parametrize(("guide", "link"), LINKS)
def test_links_lead_somewhere(guide: str, link: str) -> None:
    target, _, anchor = link.partition("#")
    path = (REPOSITORY / guide).parent / target if target else REPOSITORY / guide
    assert path.exists()
    assert not anchor or anchor in anchors(path)


def test_pictures_are_small_named_and_used() -> None:
    images = sorted((REPOSITORY / "docs" / "images").glob("*.[pg][ni][gf]"))
    assert {image.suffix for image in images} == {".png", ".gif"}
    texts = {guide: read(guide) for guide in GUIDES}
    for image in images:
        assert image.stat().st_size < (100_000 if image.suffix == ".png" else 1_300_000)
        assert np.asarray(Image.open(image).convert("L")).std() > 10, "an empty picture"
        assert f"`{image.name}`" in texts[Path("docs/images/README.md")]
        assert any(f"images/{image.name})" in text for text in texts.values())


def test_the_readme_is_short() -> None:
    """The README has at most 350 lines, and its guide at most 100 words between two pictures or code blocks."""
    text = read(Path("README.md"))
    assert len(text.splitlines()) <= 350
    guide = text.split("\n## Introduction\n")[1].split("\n## Conclusion\n")[0]
    for part in re.split(r"^!\[[^\n]*$", FENCE.sub("![", guide), flags=re.M):
        prose = [line for line in part.splitlines() if not line.startswith("#")]
        assert len(" ".join(prose).split()) <= 100, part


@pytest.mark.slow
def test_the_reference_is_what_the_configs_say() -> None:
    assert reference.REFERENCE.read_text() == reference.generate(), "run: python docs/reference.py"


def test_a_type_in_words_holds_for_derived_settings() -> None:
    for name in ("FeedForward", "DirectionNet"):
        types = dict(reference.types_of(SCHEMAS[f"mnist_lightning.network.{name}"]))
        assert types["hidden"] == "int or list of int"


def test_the_reference_knows_types_limits_and_meanings() -> None:
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in reference.REFERENCE.read_text().splitlines()
        if line.startswith("|")
    ]
    assert ["`model.dropout`", "float", "`0.0`", "in [0, 1)"] in [row[1:5] for row in rows]
    assert ["`optimizer.lr`", "float", "`0.05`", "a finite number > 0"] in [row[1:5] for row in rows]
    assert ["`checkpoint.every_n_steps`", r"int \| null", "`null`", ">= 1"] in [row[:4] for row in rows]
    keys = dict(reference.types_of(reference.schema_of("train")))
    explained = {row[-5].strip("`"): row[-1] for row in rows if len(row) >= 5}
    groups = ("model", "loss", "metrics", "optimizer", "scheduler", "trainer", "callbacks", "logger")
    assert not [key for key in keys if key not in groups and not explained.get(key)], "keys without a meaning"


FOREIGN = {  # messages of other packages -> a command that causes them
    "Could not override 'model.hiden'": "model.hiden=3",
    "Could not override 'trainer.gradient_clip_val'": "trainer.gradient_clip_val=1",
    "RuntimeError: operator torchvision::nms does not exist": "",
    "No supported gpu backend found": "",
}
MESSAGES = re.findall(r"^\| `([^`]+)`", read(Path("docs/troubleshooting.md")), re.M)


@pytest.mark.parametrize("message", MESSAGES)
def test_explained_messages_exist(message: str, command: Run, workplace: Path) -> None:
    if message in FOREIGN:
        if FOREIGN[message]:
            done = command("train", FOREIGN[message], cwd=elsewhere(workplace))
            assert done.returncode == 1
            assert message in done.stdout + done.stderr
        return
    source = "".join(path.read_text() for path in sorted((REPOSITORY / "mnist_lightning").rglob("*.py")))
    source = re.sub(r'"\s*f?"', "", source)  # join strings that continue in the next line
    source = re.sub(r"\{[^{}]*\}|\d", "", source)
    parts = re.split(r"[…\d]+", message)  # skip parts that vary
    assert max(parts, key=len) in source


class Change(NamedTuple):
    """The result of a section of docs/make_it_yours.md, or of another page."""

    folder: Path  # the folder in which its commands ran
    outputs: list[str]

    def metrics(self) -> dict[str, float]:
        (path,) = self.folder.glob("logs/train/runs/*/metrics.json")
        content: dict[str, float] = json.loads(path.read_text())
        return content

    def checkpoint(self) -> dict[str, object]:
        import torch

        (path,) = self.folder.glob("logs/train/runs/*/checkpoints/best.ckpt")
        content: dict[str, object] = torch.load(path, weights_only=True)
        return content


@pytest.fixture
def change(python: Run, tmp_path: Path) -> Callable[[str], Change]:
    """Write a page's files in their order, and run its commands.

    Without a page's name, use a section of docs/make_it_yours.md.
    """

    def apply(section: str) -> Change:
        cwd = tmp_path / "work"
        cwd.mkdir()
        if (REPOSITORY / section).is_file():
            text = read(Path(section))
        else:
            text = read(CHANGES).split(f"\n## {section}\n")[1].split("\n## ")[0]
        outputs = []
        for match in FENCE.finditer(text):
            mark, language, body = match["mark"] or "", match["language"], match["body"]
            if mark.startswith("file: "):
                path = cwd / mark.removeprefix("file: ")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(body)
            elif language == "bash" and not mark.startswith("not run: "):
                for line in body.splitlines():
                    arguments = shorten(line) if " -m " in line else [str(cwd / line.split()[1])]
                    done = python(*arguments, cwd=cwd)
                    outputs.append(done.stdout + done.stderr)
                    assert done.returncode == 0, outputs[-1]
        return Change(cwd, outputs)

    return apply


def test_an_optimizer(change: Callable[[str], Change]) -> None:
    states = change("An optimizer").checkpoint()["optimizer_states"]
    assert states[0]["param_groups"][0]["momentum_decay"] == 0.004, "which only NAdam has"  # type: ignore[index]


@pytest.mark.slow
def test_a_network(change: Callable[[str], Change]) -> None:
    done = change("A network")
    weights: dict[str, Any] = done.checkpoint()["state_dict"]  # type: ignore[assignment]
    assert weights["net.layers.0.weight"].shape == (8, 1, 5, 5), "what is typed comes after the file"
    assert "my_nets.ConvNet" in str(done.checkpoint()["hyper_parameters"])
    assert re.search(r"^accuracy +\d", done.outputs[-1], re.M)


@pytest.mark.slow
def test_a_loss(change: Callable[[str], Change]) -> None:
    done = change("A loss")
    metrics = done.metrics()
    assert metrics["val/loss"] < 0.9 * 2.3, "less than cross-entropy, which is ln 10 at first"
    assert "my_losses.focal" in done.outputs[-1]
    assert "mean cross-entropy" in done.outputs[-1]


@pytest.mark.slow
def test_a_data_set(change: Callable[[str], Change]) -> None:
    done = change("A data set")
    assert done.checkpoint()["datamodule_hyper_parameters"]["name"] == "permuted"  # type: ignore[index]
    assert done.metrics()["test/acc"] > 0.3
    assert "10,000 of permuted test" in done.outputs[-1]


@pytest.mark.slow
def test_the_case_study(change: Callable[[str], Change]) -> None:
    done = change(str(CASE_STUDY))
    assert "1,295 train, 143 val, 359 test images; training pixels have mean 0.3058" in done.outputs[1]
    assert "143 of npz val" in done.outputs[3]
    assert done.checkpoint()["hyper_parameters"]["image_shape"] == [1, 8, 8]  # type: ignore[index]
    (report,) = done.folder.glob("logs/train/multiruns/*/report.md")
    assert "data.augment.shift" in report.read_text()


def test_a_metric(change: Callable[[str], Change]) -> None:
    metrics = change("A metric").metrics()
    assert metrics["val/acc"] < metrics["val/top2"] < 1
    assert metrics["test/acc"] < metrics["test/top2"] < 1


def test_a_callback(change: Callable[[str], Change]) -> None:
    (path,) = change("A callback").folder.glob("logs/train/runs/*/csv/metrics.csv")
    rows = path.read_text().splitlines()
    column = rows[0].split(",").index("weight_norm")
    assert [float(row.split(",")[column]) > 1 for row in rows[1:] if row.split(",")[column]] == [True]


@pytest.mark.slow
def test_a_number_instead_of_a_class(change: Callable[[str], Change]) -> None:
    done = change("A number instead of a class")
    assert 0 < done.metrics()["val/error"] < 10
    assert "torch.nn.MSELoss" in done.outputs[-1]
    assert re.search(r"^error +\d", done.outputs[-1], re.M)
