"""What images hold, in 8 bytes each: equal images are known however they are called and wherever they lie."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nas.data.images import Images, Source
from nas.data.shards import Member

PIECE = 4096
"""Bytes that are read at the beginning, in the middle and at the end of a large file."""
THREADS, CHUNK = 4, 512
_known: dict[tuple[str, int, int], bytes] = {}
"""Digests of files by path, size and time of change."""


def digests(images: Images) -> np.ndarray:
    """(N,) uint64. Of a file its size and up to three pieces count: 100,000 files take seconds, not minutes.

    Rows of torchvision's and the hub's data sets go by their names.
    """
    with ThreadPoolExecutor(THREADS) as pool:  # disks and network drives answer many at once
        found = pool.map(lambda start: _part(images, start), range(0, len(images), CHUNK))
        return np.frombuffer(b"".join(found), np.uint64)


def _part(images: Images, start: int) -> bytes:
    return b"".join(_digest(images.sources[i]) for i in range(start, min(start + CHUNK, len(images))))


def _digest(source: Source) -> bytes:
    if isinstance(source, np.ndarray):
        return _of(str(source.shape).encode(), source.tobytes())
    try:
        if isinstance(source, Path):
            state = os.stat(source)
            key = str(source), state.st_size, state.st_mtime_ns
            if key not in _known:
                _known[key] = _of_bytes(source, 0, state.st_size)
            return _known[key]
        if isinstance(source, Member):
            return _of_bytes(source.shard, source.offset, source.size)
    except OSError:
        pass  # a link to nothing, which is skipped when its turn comes
    return _of(str(source).encode(errors="surrogateescape"))


def _of_bytes(path: Path, start: int, size: int) -> bytes:
    file = os.open(path, os.O_RDONLY)
    try:
        if size <= 3 * PIECE:
            return _of(str(size).encode(), os.pread(file, size, start))
        places = (start, start + (size - PIECE) // 2, start + size - PIECE)
        return _of(str(size).encode(), *(os.pread(file, PIECE, place) for place in places))
    finally:
        os.close(file)


def _of(*pieces: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=8)
    for piece in pieces:
        digest.update(piece)
    return digest.digest()
