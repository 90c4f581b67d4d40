"""Modules import only downwards and without circles, and nothing heavy before the settings are checked."""

import ast
import graphlib
import re
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "mnist_lightning"
COMMANDS = {"train", "evaluate", "visualize", "predict", "compare", "explain", "export", "report", "runs"}
HEAVY = {"torch", "lightning", "torchvision", "torchmetrics", "matplotlib", "tensorboard", "numpy", "optuna"}
# Modules that import nothing heavy at the top: commands import them before they check the settings.
LIGHT = COMMANDS | {
    *("cli", "config", "settings_help", "targets", "threads", "trust", "workarounds", "images.sources"),
    "images.known",
    *(
        "rundir.atomic",
        "rundir.claim",
        "rundir.curves",
        "rundir.find",
        "rundir.index",
        "rundir.outside",
        "rundir.output",
    ),
    *(
        "rundir.record",
        "rundir.records",
        "rundir.reproduce",
        "rundir.resume",
        "rundir.signals",
        "rundir.status",
    ),
    *("sweeps.auto", "sweeps.grid", "sweeps.importance", "sweeps.page", "sweeps.processes", "sweeps.report"),
    *("sweeps.results", "sweeps.resume"),
    *("sweeps.parts", "sweeps.search", "sweeps.study", "evaluation.significance"),
}
# A package, or a module beside the packages -> the others that it may import.
MAY_IMPORT = {
    "settings_help": set(),
    "workarounds": {"settings_help", "targets"},
    "network": set(),
    "losses": set(),
    "targets": set(),
    "figures": {"rundir"},
    "threads": {"network"},
    "config": {"images", "settings_help", "targets"},
    "cli": {"config", "rundir", "threads", "workarounds"},
    "trust": {"cli", "config", "rundir", "settings_help", "targets"},
    "images": {"rundir", "targets", "threads"},
    "data": {"images", "rundir"},
    "classifier": {"images", "losses", "network", "targets", "workarounds"},
    "rundir": {"cli", "config", "images", "settings_help", "targets", "threads", "trust", "workarounds"},
    "evaluation": {
        *("classifier", "data", "figures", "images", "network", "rundir", "targets", "threads", "trust"),
        "workarounds",
    },
    "page": {"classifier", "evaluation", "network"},
    "callbacks": {"evaluation", "figures", "images", "network", "page", "rundir", "sweeps", "workarounds"},
    "python": COMMANDS - {"train"}
    | {"cli", "classifier", "config", "data", "evaluation", "figures", "images"}
    | {"rundir", "sweeps", "threads", "workarounds"},
    "sweeps": {
        *("classifier", "cli", "config", "evaluation", "figures", "images", "page", "rundir"),
        *("settings_help", "targets", "threads", "trust", "workarounds"),
    },
}


def find_modules() -> dict[str, Path]:
    """Return the package's modules by dotted name."""
    paths = {path.relative_to(PACKAGE): path for path in PACKAGE.rglob("*.py") if path.stem != "__init__"}
    return {".".join(relative.with_suffix("").parts): path for relative, path in paths.items()}


MODULES = find_modules()
PACKAGES = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def imports(path: Path, *, at_top: bool = False) -> set[str]:
    """Return the modules that a file imports; with ``at_top``, without imports in functions."""
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in tree.body if at_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            below = {name for name in whole if name.removeprefix("mnist_lightning.") in {*MODULES, *PACKAGES}}
            names |= below or {node.module}
    return names


def ours(path: Path) -> set[str]:
    return {
        name.removeprefix("mnist_lightning.") for name in imports(path) if name.startswith("mnist_lightning.")
    }


def test_modules_import_each_other_in_no_circle() -> None:
    graph = {name: ours(path) - {name} for name, path in MODULES.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(MODULES)


def test_no_command_is_imported() -> None:
    """Only the functions for Python import commands, because they call the same functions."""
    for name, path in MODULES.items():
        if name != "python":
            assert not (ours(path) - {name}) & COMMANDS, name


@pytest.mark.parametrize("name", sorted(set(MODULES) - COMMANDS))
def test_imports_point_down(name: str) -> None:
    place = name.split(".")[0]
    assert {other.split(".")[0] for other in ours(MODULES[name])} <= MAY_IMPORT[place] | {place}


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_nothing_heavy_is_imported_at_the_top(name: str) -> None:
    assert not {other.split(".")[0] for other in imports(MODULES[name], at_top=True)} & HEAVY


def test_only_the_edge_knows_the_config() -> None:
    knowing = {name for name, path in MODULES.items() if "config" in ours(path)}
    edge = {
        "cli",
        "python",
        "trust",
        "rundir.claim",
        "rundir.index",
        "rundir.record",
        "rundir.reproduce",
        "rundir.resume",
        "sweeps.grid",
        "sweeps.parts",
        "sweeps.search",
        "sweeps.processes",
        "sweeps.resume",
    }
    assert knowing <= COMMANDS | edge


def test_no_module_shadows_the_standard_library() -> None:
    import sys

    assert not {path.stem for path in PACKAGE.glob("*.py")} & sys.stdlib_module_names


def test_private_names_of_libraries_are_in_one_place() -> None:
    """The exceptions are base classes of Hydra, which it loads again when it searches for plugins, and torch's
    documented _foreach functions."""
    for name, path in MODULES.items():
        if name != "workarounds":
            private = [one for one in imports(path) if re.search(r"\._(?!internal)[a-z]", one)]
            used = re.findall(
                r"(?<!self)(?<!cls)(?<!os)(?<!signals)\._(?!internal)[a-z]\w+", path.read_text()
            )
            assert (
                private + [one for one in used if one not in ("._target_", "._args_", "._foreach_lerp_")]
                == []
            ), name
