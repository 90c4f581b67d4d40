"""Set up every command: read paths from the command line as they are typed, print errors in one line."""

import codecs
import contextlib
import errno
import gc
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from hydra.errors import CompactHydraException

from mnist_lightning import threads, workarounds
from mnist_lightning.config import register
from mnist_lightning.rundir import signals
from mnist_lightning.rundir.outside import as_command, as_text


class CommandError(CompactHydraException):
    """A command can't go on; Hydra prints the message without a traceback."""


PLAIN = re.compile(
    r"[a-z_/][\w./-]*", re.ASCII | re.IGNORECASE
)  # Hydra's grammar reads it as itself, but these:
WORDS = ("null", "true", "false", "nan", "inf")
INTERPOLATION = r"\$\{[\w.]+(:[^{}]*(\{[^{}]*\}[^{}]*)*)?\}"  # ${key}, or a resolver's: ${now:%H-%M}

SPELLED = {"±": "+/-", "…": "...", "–": "-", "×": "x", "≥": ">=", "→": "->", "“": '"', "”": '"', "’": "'"}

typed: list[str] = []
"""The command and its arguments as the user typed them."""


# Parts of a line that get a colour on a terminal: a pattern -> a code of ECMA-48 (1991), 8.3.117
BOLD, DIM, RED, GREEN, YELLOW, CYAN = "1", "2", "31", "32", "33", "36"
COLOURED = (
    (re.compile(r"^epoch +\d+(/\d+)?(?=  )", re.M), BOLD),
    (re.compile(r"(?<=   )train (?=\w+ \S).*?(?=   |$)", re.M), CYAN),
    (re.compile(r"(?<=   )val (?=\w+ \S).*?(?=   |$)", re.M), YELLOW),
    (re.compile(r"(?<=^test accuracy        )\S+ %$", re.M), f"{BOLD};{GREEN}"),
    (re.compile(r"(?<=^validation accuracy  )\S+ %$", re.M), YELLOW),
    (re.compile(r"(?<=^train accuracy       )\S+ %$", re.M), CYAN),
    (re.compile(r"^next:$", re.M), BOLD),
    (re.compile(r"(?<=   )# .*$", re.M), DIM),
)


class PlainFormatter(logging.Formatter):
    """Format messages so that no text from a file or a name moves the cursor or changes colours."""

    def format(self, record: logging.LogRecord) -> str:
        return as_text(super().format(record), lines=True)


class ConsoleFormatter(PlainFormatter):
    """Format messages like ``PlainFormatter``, in colours where the terminal and its user allow them."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not has_colours(sys.stdout):
            return text
        if record.levelno >= logging.WARNING:
            return paint(text, RED if record.levelno >= logging.ERROR else YELLOW)
        for pattern, code in COLOURED:
            text = pattern.sub(lambda match: paint(match[0], code), text)  # noqa: B023
        return text


def has_colours(stream: TextIO) -> bool:
    """Whether a stream is a terminal with colours, and NO_COLOR (https://no-color.org) is not set."""
    knows = os.name != "nt" or "WT_SESSION" in os.environ  # Windows' older console prints codes as text
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return knows and wanted and stream.isatty()


def paint(text: str, code: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m"


def begin() -> None:
    """Prepare the process of a command, before Hydra looks for plugins and before torch is imported."""
    signals.install()  # Ctrl-C ends a command without a traceback
    threads.wait_passively()
    gc.set_threshold(20_000)  # with Python's 700, a short command spends a tenth of its time on collections
    workarounds.share_config_store()
    workarounds.keep_names_literal()
    workarounds.read_yaml_by_libyaml()
    workarounds.tell_settings_in_a_line()
    codecs.register_error("spelled", spell)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, or of Windows' pythonw.exe
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe's encoding may lack signs that we print
            stream.reconfigure(errors="spelled")
            outlive_reader(stream)
    workarounds.compose_once()
    workarounds.quiet_matplotlib()
    register()
    typed[:] = sys.argv
    try:
        folder = os.getcwd()  # a console script finds modules in the working folder, as python -m does
    except OSError as error:
        sys.exit(f"the working folder can't be used ({error.strerror}): change to another one")
    if not sys.flags.safe_path and not {"", folder} & set(sys.path):
        sys.path.insert(0, folder)


def outlive_reader(stream: TextIO) -> None:
    """Let what is written to a pipe go nowhere once its reader has left, as ``head`` does.

    The work is done all the same.
    """

    def outliving(plain: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: str) -> object:
            try:
                return plain(*arguments)
            except OSError as error:
                if error.errno != (errno.EINVAL if os.name == "nt" else errno.EPIPE):
                    raise
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
                return None

        return call

    for name in ("write", "flush"):
        setattr(stream, name, outliving(getattr(stream, name)))


def spell(error: UnicodeError) -> tuple[str, int]:
    """Replace signs that an encoding lacks by readable ones, else as ``codecs.backslashreplace_errors`` does.

    Returns:
        The replacement, and the position after the missing signs.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    spelled = (SPELLED.get(one, one.encode("ascii", "backslashreplace").decode("ascii")) for one in missing)
    return "".join(spelled), error.end


def retype(argument: str, *, without: Collection[str] = ()) -> str:
    """Return the typed command with one argument added or replaced, for the user to type.

    Args:
        argument: as "key=value".
        without: keys whose arguments are left out.
    """
    if not typed:
        return argument
    script = Path(typed[0])
    by_module = script.suffix == ".py"
    command = ["python", "-m", f"mnist_lightning.{script.stem}"] if by_module else [script.name]
    key = argument.partition("=")[0]
    left_out = (key.lstrip("+"), *without)
    kept = [one for one in typed[1:] if one.lstrip("+~").partition("=")[0] not in left_out]
    return as_command([*command, *kept, argument])


def quote_paths(keys: Collection[str], arguments: Sequence[str]) -> list[str]:
    """Quote the values of these keys, so that Hydra reads them literally.

    Hydra's grammar gives a meaning to spaces, ``( ) = , # $`` and quotes.  In a list ``[a,b]`` each
    element is quoted.  A value that the user has already quoted for Hydra stays as it is.  ``${…}`` keeps
    its meaning in Hydra, unless a file or folder of that name exists.

    Args:
        keys: keys whose values are paths or other free text.
        arguments: the command line.
    """
    pattern = re.compile(rf"(\+{{0,2}}(?:{'|'.join(map(re.escape, keys))})=)(.+)", re.DOTALL)
    matches = [(argument, pattern.fullmatch(argument)) for argument in arguments]
    return [
        match[1] + _quote_value(match[2]) if match and match[2] != "null" else argument
        for argument, match in matches
    ]


def _quote_value(value: str) -> str:
    if value[0] == "[" and value[-1] == "]" and not os.path.exists(value):
        return "[" + ",".join(_quote_value(element) for element in _split_list(value[1:-1])) + "]"
    if value[0] in "'\"" and value[-1] == value[0] and len(value) > 1:
        inside = value[1:-1]  # Windows' cmd.exe keeps quotes around a folder's name, which may end in "\\"
        is_cut = (len(inside) - len(inside.rstrip("\\"))) % 2
        return quote(inside, literal=False) if is_cut else value
    if PLAIN.fullmatch(value) and value.lower() not in WORDS:
        return value
    named = (str(path) for path in (Path(value), *Path(value).parents))
    return quote(value, literal=any("${" in name and os.path.lexists(name) for name in named))


def _split_list(text: str) -> list[str]:
    """Split a typed list at its commas, except inside quotes and inside names of existing files."""
    pieces = re.findall(r"""\s*('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^,]*)\s*(?:,|$)""", text)
    pieces = pieces[:-1] if pieces and not pieces[-1] else pieces  # the pattern also matches the end
    elements = []
    while pieces:
        names = (",".join(pieces[:count]) for count in range(len(pieces), 1, -1))
        whole = next((name for name in names if os.path.exists(name)), pieces[0])
        elements.append(whole)
        pieces = pieces[1 + whole.count(",") if whole != pieces[0] else 1 :]
    return [element for element in elements if element]


def quote(value: str, *, literal: bool = True) -> str:
    """Return a string literal of Hydra's override grammar that stands for ``value``.

    Args:
        value: any text.
        literal: whether ``${…}`` is plain text; otherwise Hydra replaces it.
    """
    # a backslash escapes only before a quote (there it must be doubled), or before "${"
    escaped = re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    if literal or not re.search(INTERPOLATION, value):
        escaped = escaped.replace("${", "\\${")
    return f"'{escaped}'"


def is_of_library(error: Exception) -> bool:
    """Whether the code of Lightning or of torch.optim has raised an error.

    They tell of unusable settings by a ValueError, a RuntimeError or an AttributeError.
    """
    frames = traceback.walk_tb(error.__traceback__)
    names = [str(frame.f_globals.get("__name__")) for frame, _ in frames]
    return bool(names) and names[-1].startswith(("lightning.", "torch.optim."))


LACK = re.compile(r"out of memory|(can't|cannot|unable to) allocate|not enough memory", re.IGNORECASE)


def tell_lack_of_memory(error: Exception) -> str | None:
    """Say in a line that memory has run out, if it is that which an error tells of.

    torch raises a RuntimeError, on a CPU and, by a subclass, on a GPU; Python and NumPy raise a MemoryError.
    """
    text = str(error)
    lacks = isinstance(error, RuntimeError) and LACK.search(text)
    if not lacks and not isinstance(error, MemoryError):
        return None
    wanted = ""
    if asked := re.search(r"allocate ([\d.]+) (bytes|[KMGT]i?B)", text):
        size, unit = asked.groups()
        amount = f"{float(size) / 1e9:.2f} GB" if unit == "bytes" else f"{size} {unit}"
        wanted = f" ({amount} more were asked for)"
    where = "the GPU's memory" if re.search(r"CUDA|MPS|HIP|GPU", text) else "memory"
    return (
        f"{where} is used up{wanted}: a smaller data.batch_size or a smaller net takes less, and so do fewer"
        " jobs at a time"
    )


@contextmanager
def compact_errors(*, log_file: Path | None = None, in_sweep: bool = False) -> Iterator[None]:
    """Print an error that the user can correct (a file, folder, number, device, too little memory) in a line.

    Args:
        log_file: file to which the traceback of any error is appended.
        in_sweep: raise a ``CommandError`` instead of ending the process, so that the other jobs go on.

    Raises:
        SystemExit: with the line, or with the shell's exit code for a signal that has arrived.  Hydra adds
            no lines to it.
        CommandError: with the line, if ``in_sweep``.
    """
    try:
        yield
    except Exception as error:
        signals.stop_if_asked()  # a library may catch a signal's exception in an import, and then fail
        if log_file is not None:
            with contextlib.suppress(OSError), log_file.open("a", encoding="utf-8") as file:
                traceback.print_exc(file=file)
        kinds: tuple[type[Exception], ...] = (OSError, FloatingPointError, CompactHydraException)
        if "lightning" in sys.modules:
            from lightning.fabric.utilities.exceptions import MisconfigurationException

            kinds += (MisconfigurationException,)
        lack = tell_lack_of_memory(error)
        known = lack or isinstance(error, kinds) or is_of_library(error)
        if not known or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        said = lack or str(error).partition("Exception raised from ")[0]  # without torch's C++ frames
        line = as_text(" ".join(said.split()))
        if isinstance(error, OSError) and error.filename is None and log_file is not None:
            line += f" ({log_file.parent})"
        if in_sweep:
            raise CommandError(line) from error
        sys.exit(line)
