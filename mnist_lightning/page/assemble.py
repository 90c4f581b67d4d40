"""One HTML file out of a template, scripts, a style and data, that needs neither network nor other files."""

import base64
import functools
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).parent


def assemble(name: str, scripts: Sequence[str], *, title: str, data: Mapping[str, Any]) -> bytes:
    """The file.  Its own policy forbids it, and whatever a text in its data might try, any request.

    Args:
        name: of the template and of its style, which comes after ``common.css``.
        scripts: files, in their order, after ``common.js``.
        data: what JSON can say; ``common.js`` reads it.
    """
    # "<" would let a text </script> end the data
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "title": html.escape(title),
        "style": read_part("common.css") + read_part(f"{name}.css"),
        "script": "\n".join(map(read_part, ("common.js", *scripts))),
        "data": text,
    }
    pieces = read_part(f"{name}.html").split("<!-- ")  # each once: what was put in is not searched again
    filled = [pieces[0]]
    for piece in pieces[1:]:
        part, _, rest = piece.partition(" -->")
        filled += [parts[part], rest]
    return "".join(filled).encode()


def encode(array: NDArray[Any]) -> str:
    """An array's bytes in base64, little-endian as in every browser's typed arrays."""
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    return base64.b64encode(little.tobytes()).decode()


@functools.cache
def read_part(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")
