"""Times as people type them, and counts as they read them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from nas.errors import UserError

MILLISECONDS = {"us": 1e-3, "µs": 1e-3, "μs": 1e-3, "ms": 1.0, "s": 1e3}
SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_budget(text: str) -> float:
    """A latency with its unit ("2ms", "1.5ms", "800us", "0.1s") in milliseconds.

    Raises:
        UserError: no unit, or not a positive time below an hour.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zµμ]*)\s*", text)
    if match and match[2] == "":
        raise UserError(f"latency budget {text!r} has no unit: write {text.strip()}ms")
    if not match or match[2] not in MILLISECONDS:
        raise UserError(f"latency budget {text!r} is not a time: write it like 2ms, 1.5ms, 800us or 0.1s")
    value = float(match[1]) * MILLISECONDS[match[2]]
    if not 0 < value < 3.6e6:
        raise UserError(f"latency budget {text!r} must be more than zero and less than an hour")
    return value


COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


def parse_share(text: str) -> float | None:
    """A share of a network's own cost ("0.5x"); None for anything else.

    Raises:
        UserError: a share of zero, or above 1x.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*x\s*", text.lower())
    if not match:
        return None
    share = float(match[1])
    if not 0 < share <= 1:
        raise UserError(f"budget {text!r} is no share of the network's own cost: give more than 0x and at most 1x")
    return share


def parse_count(text: str) -> float:
    """A count ("150M", "1.2G", "800k") as a number.

    Raises:
        UserError: not a positive count.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([kmg]?)\s*", text.lower())
    if not match or float(match[1]) == 0:
        raise UserError(f"budget {text!r} is not a count: write it like 150M, 1.2G or 0.5x")
    return float(match[1]) * COUNTS[match[2]]


MEGABYTES = {"kb": 1e-3, "mb": 1.0, "gb": 1e3, "kib": 1024 / 1e6, "mib": 1024**2 / 1e6, "gib": 1024**3 / 1e6}


def parse_size(option: str, text: str) -> float:
    """A size with its unit ("64MB", "1.5GB", "800KB", "4MiB") in 10^6 bytes.

    Raises:
        UserError: no unit, or not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)\s*", text.lower())
    if not match or match[2] not in MEGABYTES or float(match[1]) == 0:
        raise UserError(f"{option} {text!r} is not a size: write it like 64MB, 1.5GB or 800KB")
    return float(match[1]) * MEGABYTES[match[2]]


def parse_duration(text: str) -> float:
    """A duration ("90", "90s", "10m", "1.5h") in seconds.

    Raises:
        UserError: not a positive duration.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h)?\s*", text)
    if not match or float(match[1]) == 0:
        raise UserError(f"timeout {text!r} is not a duration: write it like 90s, 10m or 1h")
    return float(match[1]) * SECONDS[match[2] or "s"]


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first names, and how many more there are: "a, b, c and 2 more"."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def counted(number: int, noun: str) -> str:
    """A number and its noun: "1 thread", "2 threads"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def shown(name: str) -> str:
    """A name in one line of printable characters, as files may have others."""
    if name.isprintable():
        return name
    return "".join(each if each.isprintable() else ascii(each)[1:-1].replace("udc", "x") for each in name)
