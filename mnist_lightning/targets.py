"""Find what a ``_target_`` names, check it against its kind and its signature, and build it."""

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra.errors import CompactHydraException, InstantiationException
from hydra.utils import get_object, instantiate

TARGET = "_target_"


class TargetError(CompactHydraException):
    """A ``_target_`` that can't be used; Hydra prints it without a traceback."""


@dataclass(frozen=True)
class Kind:
    """What a group of settings builds.

    Attributes:
        base: the class of what is built, by name; None: whatever can be called.
        homes: modules, and single names, of the classes that saved settings may name.
        inner: the same for what is built within it, as an argument.
        functions: names of what else saved settings may name, a regular expression.
        refused: classes of that base that no run can use -> why, and what to do instead.
    """

    base: str | None
    homes: tuple[str, ...]
    inner: tuple[str, ...] = ()
    functions: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)


AVERAGING = "would average weights that are then not those that are tested: ema_decay=0.999 does it"
REFUSED_CALLBACKS = {
    "StochasticWeightAveraging": AVERAGING,
    "WeightAveraging": AVERAGING,
    "BatchSizeFinder": "would let a machine's memory decide the result: data.batch_size is the batch",
    "LearningRateFinder": "wants a module with a rate of its own: -m optimizer.lr=0.001,0.004 compares",
    "BackboneFinetuning": "wants a module with a backbone that is already trained, and nets here have none",
    "ModelPruning": "would leave masks in the net, which a checkpoint's own net does not have",
    "SpikeDetection": "can't be read back from a checkpoint by Lightning 2.6, which every evaluation does",
    "BasePredictionWriter": "waits for Trainer.predict, which no run calls: use the command predict",
}

ABSTRACT = ("lightning.pytorch.callbacks.BaseFinetuning",)

# Modules of metrics that compute with what they are given: others fetch models from a server or a file
METRICS = tuple(
    f"torchmetrics.{name}"
    for name in ("aggregation", "classification", "clustering", "nominal", "regression", "wrappers")
)

# The group of settings -> what its ``_target_`` builds, or each of its entries' where there are several
KINDS = {
    "model": Kind("torch.nn.Module", ("mnist_lightning.network", "torch.nn"), inner=("torch.nn",)),
    "loss": Kind(
        None,
        ("mnist_lightning.losses", "torch.nn"),
        functions=r"torch\.nn\.functional\.(\w+_loss|(binary_)?cross_entropy(_with_logits)?|kl_div)",
    ),
    "metrics": Kind("torchmetrics.Metric", METRICS, inner=METRICS, functions=r"torchmetrics\.[A-Z]\w*"),
    "data.source": Kind(None, ()),
    "optimizer": Kind("torch.optim.Optimizer", ("torch.optim",)),
    "scheduler": Kind("torch.optim.lr_scheduler.LRScheduler", ("torch.optim.lr_scheduler",)),
    "trainer": Kind(
        "lightning.pytorch.Trainer",
        ("lightning.Trainer", "lightning.pytorch.Trainer"),
        inner=("lightning.pytorch.profilers", "mnist_lightning.callbacks.profiler"),
    ),
    "callbacks": Kind(
        "lightning.pytorch.callbacks.Callback",
        ("mnist_lightning.callbacks", "lightning.pytorch.callbacks"),
        inner=("optuna.pruners", "optuna.samplers"),
        refused={f"lightning.pytorch.callbacks.{name}": why for name, why in REFUSED_CALLBACKS.items()},
    ),
    "logger": Kind(
        "lightning.pytorch.loggers.Logger",
        (  # those that write files; others send what they are given to a server
            "mnist_lightning.rundir.loggers",
            *("lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.TensorBoardLogger"),
            *("lightning.pytorch.loggers.csv_logs", "lightning.pytorch.loggers.tensorboard"),
        ),
    ),
}
PARTS = ("model", "loss", "metrics")  # of a trained net, which its checkpoint tells
SEVERAL = ("metrics", "callbacks", "logger")  # groups of things with names of their own
SIZES = ("image_shape", "num_classes")  # filled in for nets, losses and metrics that take them by name


def kind_of(key: str) -> Kind | None:
    """The kind of what a key of the settings, or the settings around it, builds."""
    group, _, rest = key.partition(".")
    return KINDS.get("data.source" if group == "data" and rest.partition(".")[0] == "source" else group)


def make(config: Mapping[str, Any], key: str, **offered: Any) -> Any:
    """Build what settings name.

    A net, a loss and a metric keep, as their ``recipe``, the settings that build them again.  Optimizers,
    schedules and what is ``_partial_`` wait for their first argument.

    Args:
        config: ``_target_`` and its arguments.
        key: of the settings, for messages; its first part says which kind is wanted.
        offered: more arguments, passed on where the signature has them by name and ``config`` does not.

    Raises:
        TargetError: there is no such class or function, it is of another kind, takes other arguments, or
            can't be built with these.
    """
    target = find(config, key)
    arguments = {name: value for name, value in config.items() if name not in (TARGET, "_partial_")}
    arguments |= {
        name: value
        for name, value in offered.items()
        if name not in arguments and name in find_arguments(target)
    }
    partial = is_partial(config, key, target)
    bind(target, arguments, key, partial=partial)
    recipe = {TARGET: config[TARGET], **arguments}
    try:
        made = instantiate(
            {**as_literal(as_literal(recipe)), "_partial_": partial}, _convert_="all"
        )  # it resolves twice
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise TargetError(
            f"{key}: {config[TARGET]} can't be built: {type(cause).__name__}: {cause}"
        ) from error
    if not partial:
        check_kind(made, key, config[TARGET])
    if key.split(".")[0] in PARTS:
        made.recipe = recipe
    return made


def as_literal(value: Any) -> Any:
    """Settings in which nothing is left to look up, such that OmegaConf takes a ``${`` in them for a text."""
    if isinstance(value, Mapping):
        return {key: as_literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_literal(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + "\\${", value)
    return value


def check_arguments(config: Mapping[str, Any], key: str) -> None:
    """Whether what settings name is there, and takes the arguments that it would be given.

    Raises:
        TargetError: see ``make``.
    """
    target = find(config, key)
    offered = {name: None for name in SIZES if name in find_arguments(target)}
    bind(target, offered | dict(config), key, partial=is_partial(config, key, target))


def find(config: Mapping[str, Any], key: str) -> Callable[..., Any]:
    """The class or function that settings name.

    Raises:
        TargetError: there is none, or it is a class of another kind.
    """
    name = config.get(TARGET)
    if not isinstance(name, str):
        raise TargetError(f"{key} names no {TARGET}: give it the dotted name of a class, got {name!r}")
    try:
        target = get_object(name)
    except Exception as error:  # whatever the module's own code raises
        cause = error.__cause__ or error
        raise TargetError(f"{key}.{TARGET}={name} can't be imported: {cause}") from error
    if not callable(target):
        raise TargetError(f"{key}.{TARGET}={name} is neither a class nor a function")
    base = base_of(key)
    if inspect.isclass(target) and base is not None and not issubclass(target, get_object(base)):
        raise TargetError(f"{key}.{TARGET}={name} is no {base}")
    kind = kind_of(key)
    for refused, why in (kind.refused if kind and inspect.isclass(target) else {}).items():
        if issubclass(target, get_object(refused)):
            raise TargetError(f"{key}.{TARGET}={name} {why}")
    if target in {get_object(one) for one in ABSTRACT if one.startswith(name.split(".")[0])}:
        raise TargetError(
            f"{key}.{TARGET}={name} does nothing by itself: name a class that is derived from it"
        )
    for inner in find_inner(list(config.values())):
        check_home(get_object(inner), inner)
    check_home(target, name)
    result: Callable[..., Any] = target
    return result


def find_inner(value: Any) -> Iterator[str]:
    """The names in what is nested in settings."""
    if isinstance(value, Mapping):
        if isinstance(value.get(TARGET), str):
            yield value[TARGET]
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from find_inner(inner)


def check_home(target: Any, name: str) -> None:
    """
    Raises:
        TargetError: a name begins as a module that saved settings may name, and by a detour through what is
            imported there leads elsewhere: ``torch.nn.modules.module.torch.package.PackageExporter``.
    """
    modules = {one for kind in KINDS.values() for one in (*kind.homes, *kind.inner) if not is_class(one)}
    homes = [one for one in modules if name.startswith(f"{one}.")]
    module = str(getattr(target, "__module__", None) or name.rpartition(".")[0])
    if homes and not f"{module}.".startswith(tuple(f"{one}." for one in homes)):
        raise TargetError(f"{name} is not defined in {min(homes, key=len)}: name {module} itself")


def is_class(name: str) -> bool:
    """Whether a dotted name is, by its look, a class's and not a module's."""
    return name.rpartition(".")[2][0].isupper()


def base_of(key: str) -> str | None:
    kind = kind_of(key)
    return kind.base if kind else None


def check_kind(made: Any, key: str, name: str) -> None:
    base = base_of(key)
    if base is not None and not isinstance(made, get_object(base)):
        raise TargetError(f"{key}.{TARGET}={name} gives a {type(made).__name__}, and no {base}")


def find_arguments(target: Callable[..., Any]) -> list[str]:
    """The names of what can be given by keyword."""
    signature = read_signature(target)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = signature.parameters.values() if signature else ()
    return [parameter.name for parameter in parameters if parameter.kind in kinds]


def read_signature(target: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):  # written in C
        return None


def is_partial(config: Mapping[str, Any], key: str, target: Callable[..., Any]) -> bool:
    """Whether what settings name is still to be given its first arguments.

    A function of logits and labels is the loss itself; one that needs no more than its settings makes it.
    """
    if config.get("_partial_") or key in ("optimizer", "scheduler"):
        return True
    signature = read_signature(target)
    if key != "loss" or inspect.isclass(target):
        return False
    try:
        return signature is None or not signature.bind(*config.get("_args_", ()), **own(config))
    except TypeError:
        return True


def bind(target: Callable[..., Any], arguments: Mapping[str, Any], key: str, *, partial: bool) -> None:
    """
    Raises:
        TargetError: the signature has no such arguments, or needs others.
    """
    signature = read_signature(target)
    if signature is None:
        return
    given, positional = own(arguments), arguments.get("_args_", ())
    try:
        (signature.bind_partial if partial else signature.bind)(*positional, **given)
    except TypeError as error:
        name = f"{target.__module__}.{target.__qualname__}"
        known = find_arguments(target)
        unknown = [argument for argument in given if argument not in known]
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            what = f"{key}.{unknown[0]} is no argument of {name}{hint}"
        else:
            what = f"{key}: {name}: {error}"
        raise TargetError(f"{what}; it takes {', '.join(known) or 'none'}") from error


def own(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A target's own arguments, without Hydra's ``_args_``, ``_convert_`` and ``_recursive_``."""
    return {
        name: value
        for name, value in arguments.items()
        if name not in ("_args_", "_convert_", "_recursive_", "_partial_", TARGET)
    }


def name_of(made: Any) -> str:
    """What was built, by the name that its settings gave it."""
    recipe = getattr(made, "recipe", None)
    if recipe:
        return str(recipe[TARGET])
    kind = made.func if isinstance(made, functools.partial) else type(made)
    return f"{kind.__module__}.{kind.__qualname__}"


def choose_mode(name: str, mode: str | None, higher_is_better: bool | None) -> str:
    """Whether a monitored metric is to become large or small, "max" or "min".

    Args:
        name: "val/…" of a metric.
        mode: what the settings say; None: nothing.
        higher_is_better: what the metric says of itself; None: nothing.

    Raises:
        TargetError: the settings say otherwise than the metric, or neither says anything.
    """
    wanted = {True: "max", False: "min", None: mode}[higher_is_better]
    if wanted is None:
        raise TargetError(f"monitor.mode must be max or min: {name} does not say which is better")
    if mode not in (None, wanted):
        raise TargetError(f"monitor.mode must be {wanted} with monitor.metric={name}, got {mode}")
    return wanted


def strange_modules(config: Mapping[str, Any]) -> list[str]:
    """The modules that will have to be trusted where these settings are read again."""
    names = [name for _, name, known in find_targets(config) if not known]
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))


def find_targets(config: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Each ``_target_``: the key of its settings, its name, and whether it ``is_known`` there."""

    def walk(value: Any, key: str, kind: Kind | None, nested: bool) -> Iterator[tuple[str, str, bool]]:
        if isinstance(value, Mapping):
            if TARGET in value:
                name = str(value[TARGET])
                yield key, name, is_known(name, kind, nested=nested)
                nested = True
            for name, inner in value.items():
                yield from walk(inner, f"{key}.{name}" if key else str(name), kind, nested)
        elif isinstance(value, list):
            for position, inner in enumerate(value):
                yield from walk(inner, f"{key}[{position}]", kind, nested)

    for group, value in config.items():
        kind = KINDS.get(group)
        if group in SEVERAL and isinstance(value, Mapping) and TARGET not in value:
            for name, inner in value.items():
                # an entry is of its group's kind, what lies below it is not
                direct = not isinstance(inner, Mapping) or TARGET in inner
                yield from walk(inner, f"{group}.{name}", kind, not direct)
        else:
            direct = not isinstance(value, Mapping) or TARGET in value
            yield from walk(value, str(group), None if group in SEVERAL else kind, not direct)


def is_known(name: str, kind: Kind | None, *, nested: bool) -> bool:
    """Whether a name is, by its look, that of a class where this kind is at home.

    ``targets.make`` looks at the class itself.

    Args:
        kind: None: nothing is to be built there.
    """
    if kind is None:
        return False
    for home in kind.inner if nested else kind.homes:
        if name == home and is_class(home):
            return True
        if not is_class(home) and re.fullmatch(rf"{re.escape(home)}(\.[a-z_]\w*)*\.[A-Z]\w*", name):
            return True
    others = kind.functions if kind.inner or not nested else ""
    return bool(others) and re.fullmatch(others, name) is not None
