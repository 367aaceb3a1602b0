"""Which images a network's weights were trained on: digests in a file beside them, 8 bytes an image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.files import drafted

if TYPE_CHECKING:
    import numpy as np

    from nas.data.images import Images

SEEN = "model.seen.npy"
TIMM = "timm"
"""Weights that were trained on ImageNet, not on the user's images."""


def record(folder: Path, images: Images, *parents: str | Path | None) -> dict[str, Any] | None:
    """Keep what the weights in `folder` were trained on: these images, and what their `parents` were trained on.

    Returns:
        The file and its number of images; None, and no file, where it is unknown what a parent was trained on.
    """
    import numpy as np

    from nas.data.digests import digests

    known = seen_by(*parents)
    if known is None:
        (folder / SEEN).unlink(missing_ok=True)
        return None
    found = np.union1d(digests(images), known)
    with drafted(folder / SEEN) as draft, draft.open("wb") as file:
        np.save(file, found.view([(_column(), np.uint64)]))
    return {"file": SEEN, "images": len(found)}


def seen_by(*weights: str | Path | None) -> np.ndarray | None:
    """Digests of the images that weights were trained on: none of random ones and timm's; None where it is unknown of
    any of them."""
    import numpy as np

    found = [np.empty(0, np.uint64)]
    for each in weights:
        if each is not None and str(each) != TIMM:
            kept = _read(_beside(each))
            if kept is None:
                return None
            found.append(kept)
    return np.unique(np.concatenate(found))


def _beside(weights: str | Path) -> Path:
    path = Path(weights)
    return path / SEEN if path.is_dir() else path.with_name(SEEN)


def _read(path: Path) -> np.ndarray | None:
    """A file's digests; None where there is none, or where it is damaged or of another version."""
    import numpy as np

    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            kept = np.lib.format.read_array(file, allow_pickle=False)
    except Exception:  # numpy's errors are of many kinds
        return None
    return kept.view(np.uint64) if kept.dtype == [(_column(), np.uint64)] and kept.ndim == 1 else None


def _column() -> str:
    """What the file calls its digests: those of another version compare with none of today's, and count as unknown."""
    from nas.data.digests import VERSION

    return f"digest{VERSION}"


def seen_among(images: Images, seen: np.ndarray) -> np.ndarray:
    """(N,) whether each image is among those seen; not looked at where none is."""
    import numpy as np

    from nas.data.digests import digests

    return np.isin(digests(images), seen) if len(seen) else np.zeros(len(images), bool)


def remark(weights: str | Path | None, images: Images, what: str) -> str | None:
    """What to say of weights that were trained on some of the images, or may have been; None where they were not."""
    seen = seen_by(weights)
    if seen is None:
        assert weights is not None  # of random ones it is known
        path = _beside(weights)
        why = f" ({path} is damaged or of another version)" if path.is_file() else ""
        return (
            f"which images {weights} was trained on is unknown{why}: if {what} images are among them, figures are "
            "too high"
        )
    count = int(seen_among(images, seen).sum())
    if not count:
        return None
    return f"{count:,} of {len(images):,} {what} images were in the training of {weights}: figures are too high"
