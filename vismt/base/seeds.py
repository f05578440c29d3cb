"""Seeds and digests of texts, equal on every machine."""

from __future__ import annotations

import hashlib


def mix_seed(seed: int, *items: int | str) -> int:
    """Return a 63-bit seed from `seed` and further items, equal on every machine (BLAKE2b of their text)."""
    return int(digest(":".join(str(item) for item in (seed, *items)).encode()), 16) >> 1


def digest(content: bytes) -> str:
    """Return 16 hexadecimal digits of BLAKE2b."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()
