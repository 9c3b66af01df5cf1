"""Images turned, shifted, scaled, cropped, mirrored, brightened and erased in one pass: bilinear resampling."""

from __future__ import annotations

import math
from typing import Any

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
    middle_h, middle_w, half = (H - 1) / 2, (W - 1) / 2, erase * min(H, W) / 2
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
        for h in range(H):
            for w in range(W):
                # Where in x the middle of this pixel comes from.
                from_h, from_w = h - middle_h - down, mirror * (w - middle_w) - across
                h0, w0 = cos * from_h - sin * from_w + middle_h, sin * from_h + cos * from_w + middle_w
                top, left = math.floor(h0), math.floor(w0)
                low, right = x.dtype.type(h0 - top), x.dtype.type(w0 - left)
                erased = abs(h - hole_h) < half and abs(w - hole_w) < half
                for c in range(C):
                    total = x.dtype.type(0)
                    if not erased:
                        for i in range(2):
                            for j in range(2):
                                at_h, at_w = int(top) + i, int(left) + j
                                if 0 <= at_h < H and 0 <= at_w < W:
                                    of_h = low if i else 1 - low
                                    of_w = right if j else 1 - right
                                    total += of_h * of_w * x[n, at_h, at_w, c]
                    y[n, h, w, c] = light * total
