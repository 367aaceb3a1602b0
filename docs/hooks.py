"""Hooks of mkdocs: the command line's reference is written by typer when the site is built."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

CODE = re.compile(r"(```.*?```|`[^`]*`)", re.S)
EXAMPLE = re.compile(r"^(?:(Example):)?  ((?:vitnas|torchrun) .*)$", re.M)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str | None:
    """Raises subprocess.CalledProcessError where the command line cannot be imported."""
    if page.file.src_uri != "reference/cli.md":
        return None
    command = [sys.executable, "-m", "typer", "nas.cli.app", "utils", "docs", "--name", "vitnas"]
    docs = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    body = EXAMPLE.sub(r"\1 `\2`", docs.split("\n", 1)[1])
    parts = CODE.split(body)
    parts[::2] = [text.replace("<", "&lt;").replace("[", "\\[") for text in parts[::2]]
    return markdown + "".join(parts)
