"""A stand-in for `nas.search.train_worker`: `visible` says what it does, FOLDER/DEVICE what it has done."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from nas.process import serve, tell


def train(visible: str, request: str) -> dict[str, Any]:
    begun = Path(os.environ["CREW_FOLDER"], visible)
    starts = int(begun.read_text()) if begun.exists() else 0
    begun.write_text(str(starts + 1))
    tell("say", f"{visible} starts")
    tell("phase", "training", starts, 3)
    if visible == "refuses":
        raise ValueError("the images are gone")
    if visible == "dies" or (visible == "dies-once" and not starts):
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        tell("say", f"{visible} waits")
        time.sleep(60)
    except KeyboardInterrupt:
        begun.with_suffix(".aside").touch()
        raise
    return {}


if __name__ == "__main__":
    serve({"train": train})
