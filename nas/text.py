"""Text that is printed: one line, and without passwords."""

from __future__ import annotations

import re


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters of it; the error's class where it has none. Of
    OpenVINO's, which begin with its source files, the last line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if lines[0].startswith("Exception from src/") else 0][:200]


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error's message, without its full stop; the error's class where it has none."""
    lines = str(error).strip().splitlines()
    return re.split(r"(?<=[a-z)\]])\. ", lines[0])[0].rstrip(".") if lines else type(error).__name__


SECRETS = [  # what precedes a password in a URL, and the password
    re.compile(r"(://[^:@/?]*:)(.*)(?=@)"),
    re.compile(r"((?i:password|passwd|pwd)=)([^&]*)"),
]


def mask_url(url: str) -> str:
    """`url` with its password, in the authority or in a query parameter, replaced by ***."""
    for secret in SECRETS:
        url = secret.sub(r"\1***", url)
    return url
