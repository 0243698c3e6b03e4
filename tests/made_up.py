"""Small notebooks for the tests of the tools."""

import json
from pathlib import Path


def code(source: str, *, tags=(), count=None, outputs=()) -> dict:
    metadata = {"tags": list(tags)} if tags else {}
    lines = source.splitlines(keepends=True)
    cell = {"cell_type": "code", "metadata": metadata, "source": lines}
    return {**cell, "execution_count": count, "outputs": list(outputs)}


def markdown(source: str, *, tags=()) -> dict:
    metadata = {"tags": list(tags)} if tags else {}
    return {"cell_type": "markdown", "metadata": metadata, "source": source.splitlines(keepends=True)}


def notebook(*cells: dict) -> dict:
    """A notebook in format 4.5; its cells get ids, its code cells keep the counts they have."""
    numbered = [{**cell, "id": f"cell-{number:03d}"} for number, cell in enumerate(cells, 1)]
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return {"cells": numbered, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def save(path: Path, *cells: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook(*cells), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path
