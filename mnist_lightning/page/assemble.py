"""Assemble one HTML file of a template, scripts, styles and data; it needs no network and no other files."""

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
    """Return the content of the file.  Its security policy forbids all requests, also by texts in its data.

    Args:
        name: name of the template and of its style, which follows ``common.css``.
        scripts: script files in their order; they follow ``common.js``.
        title: the page's title.
        data: values that JSON can hold, for ``common.js``.
    """
    # escape "<", because a text </script> would end the data
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "title": html.escape(title),
        "style": read_part("common.css") + read_part(f"{name}.css"),
        "script": "\n".join(map(read_part, ("common.js", *scripts))),
        "data": text,
    }
    pieces = read_part(f"{name}.html").split("<!-- ")  # split once: inserted parts are not searched again
    filled = [pieces[0]]
    for piece in pieces[1:]:
        part, _, rest = piece.partition(" -->")
        filled += [parts[part], rest]
    return "".join(filled).encode()


def encode(array: NDArray[Any]) -> str:
    """Encode an array's bytes in base64, little-endian as in every browser's typed arrays."""
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    return base64.b64encode(little.tobytes()).decode()


@functools.cache
def read_part(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")
