"""Whether the Hugging Face hub can be reached. PyTorch is not imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nas.text import first_sentence


def unreachable() -> str | None:
    """Why the hub cannot be reached, in words; None: it answers."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:
        return f"{constants.ENDPOINT} does not answer: {first_sentence(error)}"
    return None


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Ask the hub once: without an answer its client retries for most of a minute before it looks at home."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or unreachable() is not None
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
