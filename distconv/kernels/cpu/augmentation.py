"""Images turned, shifted, scaled, cropped, mirrored, brightened and erased in one pass: bilinear resampling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from distconv.kernels.compiled import compiled


@compiled
def warp(x: Any, numbers: Any, amounts: Any, y: Any) -> None:
    """y (N, H, W, C) from x, by random numbers (N, 10) from 0 to 1 and the amounts of data/augment.py's Augmentation.

    Numbers 0 and 1 are for angle and scale, 2 to 5 for the shifts and the crops down and across, 6 for flip, 7 for
    brightness, 8 and 9 for the middle of what is erased. An image is turned about its middle, clockwise from 0.5 on,
    scaled, moved down and to the right, mirrored. Places are in float64, numbers in the dtype of x.
    """
    rotate, shift, scale, crop, flip, brightness, erase = amounts
    N, H, W, C = x.shape
    one = x.dtype.type(1)
    middle_h, middle_w, half = (H - 1) / 2, (W - 1) / 2, erase * min(H, W) / 2
    wide = W + 4
    padded = np.zeros((C, (H + 4) * wide), x.dtype)  # an image with two pixels of 0 all around: no place is outside
    # Of each pixel of a row: the place in padded of the upper left of the four it comes from, and how far below that
    # and to its right it comes from.
    places, lows, rights = np.empty(W, np.uint32), np.empty(W, x.dtype), np.empty(W, x.dtype)
    for n in range(N):
        u = numbers[n]
        angle = (2 * u[0] - 1) * rotate * (math.pi / 180)
        size = 1 + (2 * u[1] - 1) * scale
        down = (2 * u[2] - 1) * shift * H + math.floor(u[4] * (2 * crop + 1)) - crop
        across = (2 * u[3] - 1) * shift * W + math.floor(u[5] * (2 * crop + 1)) - crop
        mirror = -1.0 if flip > 0 and u[6] < 0.5 else 1.0
        light = x.dtype.type(1 + (2 * u[7] - 1) * brightness)
        hole_h, hole_w = u[8] * H - 0.5, u[9] * W - 0.5
        cos, sin = math.cos(angle) / size, math.sin(angle) / size
        for c in range(C):
            for h in range(H):
                for w in range(W):
                    padded[c, (h + 2) * wide + w + 2] = x[n, h, w, c]
        for h in range(H):
            from_h = h - middle_h - down
            for w in range(W):  # where in x the middle of this pixel comes from
                from_w = mirror * (w - middle_w) - across
                h0, w0 = cos * from_h - sin * from_w + middle_h, sin * from_h + cos * from_w + middle_w
                top, left = np.floor(h0), np.floor(w0)
                lows[w], rights[w] = x.dtype.type(h0 - top), x.dtype.type(w0 - left)
                top, left = min(max(top + 2, 0.0), H + 2.0), min(max(left + 2, 0.0), W + 2.0)
                places[w] = np.uint32(top * wide + left)
            for c in range(C):
                for w in range(W):
                    i, low, right = places[w], lows[w], rights[w]
                    j = i + np.uint32(wide)
                    above = (one - right) * padded[c, i] + right * padded[c, i + np.uint32(1)]
                    below = (one - right) * padded[c, j] + right * padded[c, j + np.uint32(1)]
                    y[n, h, w, c] = light * ((one - low) * above + low * below)
            if abs(h - hole_h) < half:
                for w in range(W):
                    if abs(w - hole_w) < half:
                        y[n, h, w] = 0
