"""Runs a notebook without Jupyter.

    python -m tests.docs.notebook docs/Tutorial.ipynb

writes the outputs of its cells into the file: printed text, and the value of the last line.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from PIL import Image

PICTURE_SIDE = 420  # pixels of a picture in an output
QUALITY = 75


def run_cells(notebook: dict) -> list[list[dict]]:
    """Runs all code cells in one namespace; the outputs of each, as notebooks store them."""
    names, outputs = {"__name__": "__main__"}, []
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        outputs.append(_run("".join(cell["source"]), f"<cell {number}>", names, number))
    return outputs


def store(path: Path) -> None:
    """Runs the notebook at `path` and writes it back with its outputs."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, outputs) in enumerate(zip(cells, run_cells(notebook), strict=True), 1):
        cell["execution_count"], cell["outputs"] = number, outputs
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _run(source: str, name: str, names: dict, number: int) -> list[dict]:
    tree, value, text = ast.parse(source, name), None, io.StringIO()
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with redirect_stdout(text):
        exec(compile(tree, name, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
    outputs = []
    if text.getvalue():
        lines = text.getvalue().splitlines(True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    if value is not None:
        result = {"output_type": "execute_result", "execution_count": number, "metadata": {}}
        outputs.append({**result, "data": _data(value)})
    return outputs


def _data(value) -> dict:
    if not isinstance(value, Image.Image):
        return {"text/plain": [repr(value)]}
    small, buffer = value.convert("RGB"), io.BytesIO()
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    small.save(buffer, "JPEG", quality=QUALITY)
    picture = base64.b64encode(buffer.getvalue()).decode()
    return {"image/jpeg": picture, "text/plain": [f"<image of {value.width} x {value.height}>"]}


if __name__ == "__main__":
    store(Path(sys.argv[1]))
