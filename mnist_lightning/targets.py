"""Find what a ``_target_`` names, check it against its kind and its signature, and build it."""

import difflib
import functools
import inspect
import math
import os
import re
import types
import typing
from collections import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeGuard

from hydra.errors import CompactHydraException, InstantiationException
from hydra.utils import get_object, instantiate

TARGET = "_target_"


class TargetError(CompactHydraException):
    """A ``_target_`` can't be used; Hydra prints the message without a traceback."""


@dataclass(frozen=True)
class Kind:
    """The kind of object that a group of settings builds.

    Attributes:
        base: name of the class that the object must be an instance of; None accepts any callable.
        homes: modules whose classes saved settings may name, and names of single classes.
        inner: the same for objects that are arguments of this one.
        functions: regular expression of other names that saved settings may name.
        refused: subclasses of ``base`` that no run can use -> why, and what to do instead.
    """

    base: str | None
    homes: tuple[str, ...]
    inner: tuple[str, ...] = ()
    functions: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)


AVERAGING = "would average weights, but not those that are tested: use ema_decay=0.999"
REFUSED_CALLBACKS = {
    "StochasticWeightAveraging": AVERAGING,
    "WeightAveraging": AVERAGING,
    "BatchSizeFinder": "would make the result depend on a machine's memory: set data.batch_size",
    "LearningRateFinder": "needs a module with a learning rate of its own: use debug=lr_range",
    "BackboneFinetuning": "needs a module with a trained backbone, which nets here do not have",
    "ModelPruning": "would leave masks in the net, so that its checkpoint could not be loaded",
    "SpikeDetection": "writes a state that Lightning 2.6 can't load from a checkpoint",
    "BasePredictionWriter": "needs Trainer.predict, which no run calls: use the command predict",
}

ABSTRACT = ("lightning.pytorch.callbacks.BaseFinetuning",)

# Modules of metrics that need only their inputs; others download models or read files
METRICS = tuple(
    f"torchmetrics.{name}"
    for name in ("aggregation", "classification", "clustering", "nominal", "regression", "wrappers")
)

# The group of settings -> the kind that its ``_target_``, or the ``_target_`` of each of its entries, builds
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
        (  # loggers that write files; others send data to a server
            "mnist_lightning.rundir.loggers",
            *("lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.TensorBoardLogger"),
            *("lightning.pytorch.loggers.csv_logs", "lightning.pytorch.loggers.tensorboard"),
        ),
    ),
}
PARTS = ("model", "loss", "metrics")  # groups that a checkpoint keeps, to build the trained net again
SEVERAL = ("metrics", "callbacks", "logger")  # groups of several named entries
CROSS_ENTROPIES = "mnist_lightning.losses."  # each loss of this module is cross-entropy outside training
SIZES = ("image_shape", "num_classes")  # given to nets, losses and metrics that have such arguments
TYPED = (
    "mnist_lightning.",
    "torch.",
    "lightning.",
    "torchmetrics.",
    "optuna.",
)  # their annotations are right
LISTS = (list, tuple, abc.Iterable, abc.Sequence, abc.Collection)
WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    types.NoneType: "null",
}  # a type of arguments -> its values in words
PLANNED = "total_steps"  # an argument of a schedule that stands for the run's number of steps


def kind_of(key: str) -> Kind | None:
    """Return the kind of object that the group of a key builds; None if the group builds none."""
    group, _, rest = key.partition(".")
    return KINDS.get("data.source" if group == "data" and rest.partition(".")[0] == "source" else group)


def make(config: Mapping[str, Any], key: str, **offered: Any) -> Any:
    """Build the object that a ``_target_`` names.

    A net, a loss or a metric keeps the settings that build it again as its ``recipe``.  For optimizers,
    schedules and settings with ``_partial_`` the result is a ``functools.partial`` that waits for the first
    argument.

    Args:
        config: ``_target_`` and its arguments.
        key: key of the settings, for messages; its first part decides the kind.
        offered: further arguments, used if the signature has them by name and ``config`` does not.

    Raises:
        TargetError: there is no such class or function, it is of another kind, it takes other arguments, or
            it can't be built with these.
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
        )  # instantiate resolves interpolations twice, so escape them twice
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
    """Escape each ``${`` in settings, so that OmegaConf reads it as text."""
    if isinstance(value, Mapping):
        return {key: as_literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_literal(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + "\\${", value)
    return value


def check_arguments(config: Mapping[str, Any], key: str) -> None:
    """Check that a ``_target_`` exists and takes the arguments that it would get.

    Raises:
        TargetError: see ``make``.
    """
    target = find(config, key)
    offered = {name: None for name in SIZES if name in find_arguments(target)}
    bind(target, offered | dict(config), key, partial=is_partial(config, key, target))


def check_types(config: Mapping[str, Any], key: str) -> None:
    """Check the arguments of a ``_target_``, and of those nested in it, against its annotations.

    Python does not, and a text in the place of a switch would count as true.  Only annotations of this
    project and of the libraries that it is built on are trusted.

    Raises:
        TargetError: an argument has another type, or is not a number; or a nested ``_target_`` takes other
            arguments.
    """
    target = get_object(config[TARGET])
    if str(getattr(target, "__module__", "")).startswith(TYPED):
        check_hints(config, read_hints(target), key)
    for name, value in config.items():
        if is_target(value) and config.get("_recursive_", True):
            inner = f"{key}.{name}"
            bind(get_object(value[TARGET]), value, inner, partial=bool(value.get("_partial_")))
            check_types(value, inner)


def check_hints(config: Mapping[str, Any], hints: Mapping[str, Any], key: str) -> None:
    """Check arguments against the type of each.

    Args:
        config: the arguments.
        hints: the types by name; those that are missing are not checked.
        key: key of the settings, for messages.

    Raises:
        TargetError: an argument has another type.
    """
    for name, hint in {**hints, "_partial_": bool}.items():
        if name in config and not takes(hint, config[name]) and (key, config[name]) != ("scheduler", PLANNED):
            raise TargetError(f"{key}.{name} must be {in_words(hint)}, got {config[name]}")


def read_hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of the arguments of a class or function, as far as they are known."""
    makers = (target.__new__, target.__init__) if inspect.isclass(target) else (target,)
    hints: dict[str, Any] = {}
    for maker in map(inspect.unwrap, makers):
        annotations, names = getattr(maker, "__annotations__", {}), getattr(maker, "__globals__", {})
        hints |= {name: read_hint(hint, names) for name, hint in annotations.items()}
    signature = read_signature(target)
    for name, parameter in (signature.parameters if signature else {}).items():
        if name in hints and parameter.default is None:
            hints[name] = typing.Optional[hints[name]]  # noqa: UP045  # a type that is no class has no "|"
    return hints


def read_hint(hint: Any, names: Mapping[str, Any]) -> Any:
    """Return the type that an annotation names; ``Any`` where a name in it is unknown."""
    holder = types.SimpleNamespace(__annotations__={"hint": hint})
    try:
        return typing.get_type_hints(holder, {**vars(typing), **names})["hint"]
    except (NameError, AttributeError, TypeError, SyntaxError):
        return Any


def takes(hint: Any, value: Any) -> bool:
    """Tell whether a value from settings fits the type of an argument."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(takes(one, value) for one in inner)
    if kind is typing.Literal:
        return value in inner
    if kind is int:
        return is_whole(value)
    if kind is float:
        return is_whole(value) or (isinstance(value, float) and not math.isnan(value))
    if kind in LISTS:
        kinds = [one for one in inner if one is not ...] or [Any]
        return isinstance(value, (list, tuple)) and all(
            any(takes(one, element) for one in kinds) for element in value
        )
    if kind in (Any, object) or not inspect.isclass(kind):
        return True
    if issubclass(kind, (os.PathLike, Enum)) and isinstance(value, str):
        return True
    return isinstance(value, kind) or (kind not in WORDS and is_target(value))


def in_words(hint: Any) -> str:
    """Describe the values that an argument of a type takes."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(in_words, inner)))
    if kind is typing.Literal:
        return " or ".join(map(str, inner))
    if kind in LISTS:
        kinds = [one for one in inner if one is not ...] or [Any]
        return f"a list [{in_words(kinds[0])}, …]"
    if inspect.isclass(kind) and issubclass(kind, os.PathLike):
        return WORDS[str]
    return WORDS.get(kind, f"settings with a {TARGET}")


def is_whole(value: Any) -> bool:
    """Tell whether a value is a whole number of at most 64 bits."""
    return type(value) is int and abs(value) < 2**63


def is_finite(value: Any) -> TypeGuard[int | float]:
    """Tell whether a value is a whole number of at most 64 bits, or a finite float."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def is_target(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get(TARGET), str)


def find(config: Mapping[str, Any], key: str) -> Callable[..., Any]:
    """Import the class or function that a ``_target_`` names.

    Raises:
        TargetError: there is none, or it is a class of another kind.
    """
    name = config.get(TARGET)
    if not isinstance(name, str):
        raise TargetError(f"{key} names no {TARGET}: it must be the dotted name of a class, got {name!r}")
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
        raise TargetError(f"{key}.{TARGET}={name} does nothing by itself: name a subclass of it")
    for inner in find_inner(list(config.values())):
        check_home(get_object(inner), inner)
    check_home(target, name)
    result: Callable[..., Any] = target
    return result


def find_inner(value: Any) -> Iterator[str]:
    """Yield each ``_target_`` that is nested in settings."""
    if isinstance(value, Mapping):
        if is_target(value):
            yield value[TARGET]
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from find_inner(inner)


def check_home(target: Any, name: str) -> None:
    """Check that an object is defined in the module under whose name it was found.

    A name may begin with a module that saved settings may use and lead elsewhere through its imports:
    ``torch.nn.modules.module.torch.package.PackageExporter``.

    Raises:
        TargetError: the object is defined elsewhere.
    """
    modules = {one for kind in KINDS.values() for one in (*kind.homes, *kind.inner) if not is_class(one)}
    homes = [one for one in modules if name.startswith(f"{one}.")]
    module = str(getattr(target, "__module__", None) or name.rpartition(".")[0])
    if homes and not f"{module}.".startswith(tuple(f"{one}." for one in homes)):
        raise TargetError(f"{name} is not defined in {min(homes, key=len)}: name {module} itself")


def is_class(name: str) -> bool:
    """Whether the last part of a dotted name begins with a capital letter, as names of classes do."""
    return name.rpartition(".")[2][0].isupper()


def base_of(key: str) -> str | None:
    kind = kind_of(key)
    return kind.base if kind else None


def check_kind(made: Any, key: str, name: str) -> None:
    base = base_of(key)
    if base is not None and not isinstance(made, get_object(base)):
        raise TargetError(f"{key}.{TARGET}={name} gives a {type(made).__name__}, and no {base}")


def find_arguments(target: Callable[..., Any]) -> list[str]:
    """Return the names of all arguments that can be given by keyword."""
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
    """Whether the object needs further arguments later, as optimizers and schedules do.

    A loss may be a function of logits and labels, or a function that its settings alone are enough to call
    and that returns the loss.  Only the former needs further arguments.
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
    """Check arguments against a signature.

    Args:
        target: a class or function.
        arguments: its arguments, with Hydra's ``_args_`` among them.
        key: key of the settings, for messages.
        partial: whether required arguments may be missing.

    Raises:
        TargetError: the signature does not have these arguments, or needs others.
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
    """Return a target's own arguments, without ``_target_`` and Hydra's other keys."""
    return {
        name: value
        for name, value in arguments.items()
        if name not in ("_args_", "_convert_", "_recursive_", "_partial_", TARGET)
    }


def name_of(made: Any) -> str:
    """Return the dotted name of an object's class or function, as its settings give it."""
    recipe = getattr(made, "recipe", None)
    if recipe:
        return str(recipe[TARGET])
    kind = made.func if isinstance(made, functools.partial) else type(made)
    return f"{kind.__module__}.{kind.__qualname__}"


def choose_mode(name: str, mode: str | None, higher_is_better: bool | None) -> str:
    """Choose whether the best value of a metric is the highest ("max") or the lowest ("min").

    Args:
        name: name of the metric, such as "val/acc".
        mode: the mode in the settings; None: they have none.
        higher_is_better: the metric's own attribute; None: the metric does not say.

    Raises:
        TargetError: the settings contradict the metric, or neither says which is better.
    """
    wanted = {True: "max", False: "min", None: mode}[higher_is_better]
    if wanted is None:
        raise TargetError(f"monitor.mode must be max or min: {name} does not say which is better")
    if mode not in (None, wanted):
        raise TargetError(f"monitor.mode must be {wanted} with monitor.metric={name}, got {mode}")
    return wanted


def strange_modules(config: Mapping[str, Any]) -> list[str]:
    """Return the modules that a user has to trust to load these settings from a file."""
    names = [name for _, name, known in find_targets(config) if not known]
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))


def find_targets(config: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Yield each ``_target_``: the key of its settings, its name, and whether it ``is_known`` there."""

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
                # an entry has its group's kind, and settings nested in it have not
                direct = not isinstance(inner, Mapping) or TARGET in inner
                yield from walk(inner, f"{group}.{name}", kind, not direct)
        else:
            direct = not isinstance(value, Mapping) or TARGET in value
            yield from walk(value, str(group), None if group in SEVERAL else kind, not direct)


def is_known(name: str, kind: Kind | None, *, nested: bool) -> bool:
    """Whether saved settings may use a name for this kind, without importing it.

    ``make`` checks the class itself.

    Args:
        name: a dotted name.
        kind: the kind of the settings; None: they build nothing.
        nested: whether the name is of an argument's settings.
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
