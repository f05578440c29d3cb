"""Seeds and digests made of texts, the same on every machine."""

from __future__ import annotations

import hashlib


def mix_seed(seed: int, *parts: int | str) -> int:
    """A 63-bit seed from `seed` and any further parts, the same on every machine (BLAKE2b of their text)."""
    return int(digest(":".join(str(part) for part in (seed, *parts)).encode()), 16) >> 1


def digest(content: bytes) -> str:
    """16 hexadecimal digits of BLAKE2b."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()
