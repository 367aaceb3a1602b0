"""A process that a search starts to train (`nas.search.workers`): `python -m nas.search.train_worker`."""

from __future__ import annotations

import base64
import logging
import os
import pickle
import time

from nas.process import serve, tell

TELL_EVERY_S = 0.5
"""Between two tellings of the same phase."""


class _Forward(logging.Handler):
    """Has the parent say what is logged here."""

    def emit(self, record: logging.LogRecord) -> None:
        tell("say", record.getMessage())


def train(visible: str, request: str) -> dict[str, int]:
    """Train until the search that started this process ends.

    Args:
        visible: the GPU's UUID; "" for the CPU.
        request: a SearchRequest, pickled and in base64, from this process's own parent.
    """
    if visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    from nas.search.helping import train_measured

    logging.getLogger("nas").addHandler(_Forward(logging.WARNING))
    told: tuple[str, float] = ("", 0.0)

    def phase(what: str, done: int, total: int) -> None:
        nonlocal told
        if what != told[0] or time.monotonic() - told[1] >= TELL_EVERY_S:
            told = what, time.monotonic()
            tell("phase", what, done, total)

    return {"made": train_measured(pickle.loads(base64.b64decode(request)), lambda line: tell("say", line), phase)}


if __name__ == "__main__":
    serve({"train": train})
