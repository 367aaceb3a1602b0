"""The hub that the tests of this folder talk to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub.stand_in import Hub, serving
from huggingface_hub import constants, file_download

from nas.networks.hub import fetch


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub, which is the one that this process uses; it has no token."""
    with serving(tmp_path / "cache") as found:
        for name, value in {
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "ENDPOINT": found.url,
            "HF_HUB_CACHE": str(found.cache),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HUGGINGFACE_CO_URL_TEMPLATE": found.url + "/{repo_id}/resolve/{revision}/{filename}",
        }.items():
            monkeypatch.setattr(constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
        fetch.cache_clear()
        yield found
        fetch.cache_clear()
