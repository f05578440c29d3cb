"""Smooth noise, from which tests of boundaries make regions."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter


def blobs(height: int, width: int, sigma: float, seed: int) -> np.ndarray:
    """Return white noise smoothed over `sigma` pixels, float64 (h, w) in [0, 1]."""
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal((height, width)), sigma)
    return (noise - noise.min()) / (noise.max() - noise.min())
