"""Which kernel computes a pass of a convolution on a GPU, how it is compiled, and how many blocks it has.

source/convolution.cu serves every shape. With stride 1, and images that fit into a multiprocessor's memory in whole or
in bands of rows, the direct kernels are faster: source/direct.cu for `forward` and `input`, and for `filters`
source/direct_filters.cu.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distconv.kernels.gpu.device import Defines
from distconv.kernels.interface import output_size

PRECISIONS = ("float32", "tf32", "float16", "bfloat16")  # of the products' factors; sums are in float32
PASSES = {"forward": 0, "input": 1, "filters": 2}  # the enum of factors.cu, where the precisions follow
STEP, PADDED_CHANNELS = 16, 24  # BK there, and X_PIXEL of direct_filters.cu
SHARED_NUMBERS = 48 * 1024 // 4  # of a block
MOST_ACROSS = 2**16 - 1  # blocks that a grid has room for in y
ENOUGH_BLOCKS = 264  # to keep some 130 multiprocessors busy; fixed, as it decides the order of sums
# Of the direct kernels: pixels of a whole image, of a tile else, and of an image below which they lose; threads of a
# block; taps and channels that they take at once where an image has few channels.
LARGE_TILE, SMALL_TILE, LEAST_PIXELS, MOST_THREADS, FEW = 256, 128, 16, 512, 128


@dataclass(frozen=True)
class Plan:
    """How a pass is computed: `product` of a file, compiled with these macros, then `finish` if there are slices.

    slice: the share of the depth of each, in steps or in tiles.
    """

    file: str
    defines: Defines
    grid: tuple[int, int, int]
    threads: int
    slice: int


@dataclass(frozen=True)
class Convolution:
    """x (N, H, W, C), w (K, K, C, F), y (N, OH, OW, F), perhaps pooled 2 x 2."""

    H: int
    W: int
    C: int
    F: int
    K: int
    stride: int
    pad: int
    relu: bool
    pooled: bool = False
    bias: bool = True

    @property
    def OH(self) -> int:
        return output_size(self.H, self.K, self.stride, self.pad)

    @property
    def OW(self) -> int:
        return output_size(self.W, self.K, self.stride, self.pad)

    def pixels(self, N: int) -> int:
        """Of y before pooling that matter."""
        return 4 * N * (self.OH // 2) * (self.OW // 2) if self.pooled else N * self.OH * self.OW

    def product(self, which: str, N: int) -> tuple[int, int, int]:
        """Rows, columns and depth of the product of a pass."""
        taps = self.K * self.K
        if which == "forward":
            return self.pixels(N), self.F, taps * self.C
        if which == "input":
            return N * self.H * self.W, self.C, taps * self.F
        return taps * self.C + 1, self.F, N * self.OH * self.OW

    def plan(self, which: str, N: int, precision: str, aligned: bool) -> Plan:
        """aligned: w begins where four numbers can be loaded at once."""
        filters = which == "filters"
        direct = self._direct_filters(N, precision) if filters else self._direct(which, N, precision, aligned)
        return direct or self._indirect(which, N, precision, aligned)

    def _defines(self, which: str, precision: str, aligned: bool, tile: Mapping[str, int]) -> Defines:
        wide_x, wide_y = self.C % 4 == 0, self.F % 4 == 0
        values = {
            "PASS": PASSES[which], "PRECISION": len(PASSES) + PRECISIONS.index(precision),
            "H": self.H, "W": self.W, "C": self.C, "F": self.F, "K": self.K, "STRIDE": self.stride, "PAD": self.pad,
            "OH": self.OH, "OW": self.OW, "RELU": int(self.relu), "POOL": int(self.pooled), "BIAS": int(self.bias),
            "VX": 4 if wide_x else 1, "VY": 4 if wide_y else 1, "VW": 4 if wide_y and aligned else 1, **tile,
        }  # fmt: skip
        return tuple(values.items())

    def _indirect(self, which: str, N: int, precision: str, aligned: bool) -> Plan:
        """By convolution.cu."""
        rows, columns, depth = self.product(which, N)
        BM, BN, groups = self._tile(which)
        down, across, tile_depth = -(-rows // BM), -(-columns // BN), groups * STEP
        enough = ENOUGH_BLOCKS * (2 if BM * BN <= 32 * 16 else 1)  # of small ones, more
        slices = max(1, min(enough // (down * across), depth // (2 * tile_depth)))
        per_slice = -(-depth // (slices * tile_depth)) * tile_depth
        flat = across > MOST_ACROSS  # of an affine layer of millions of inputs
        defines = self._defines(which, precision, aligned, {"BM": BM, "BN": BN, "GROUPS": groups, "FLAT": int(flat)})
        grid = down * across if flat else down, 1 if flat else across, -(-depth // per_slice)
        return Plan("convolution", defines, grid, BM * BN // 16 * groups, per_slice)

    def _tile(self, which: str) -> tuple[int, int, int]:
        """Rows and columns of the product that a block of threads computes, and the groups of warps in it.

        Measured at deepconvnet's layers, 100 images, on an H200: there a multiprocessor is short of warps, so a product
        of few rows has small blocks of many groups.
        """
        rows, columns, depth = self.product(which, 1)  # of one image
        if which == "filters":
            if columns <= 16 or depth == 1:
                return 32, 16 if columns <= 16 else 32, 4
            return (64, 32, 2) if columns <= 32 else (64, 64, 1)
        if columns <= 16 and rows > 64:
            return (128, 16, 1) if rows > 256 else (64, 16, 2)
        if rows == 1:
            return 32, 16 if columns <= 16 else 32, 4
        if columns <= 32:
            return (32, 32, 2) if rows > 64 else (32, 32, 4)
        return 64, 32, 2

    def _direct(self, which: str, N: int, precision: str, aligned: bool) -> Plan | None:
        """By direct.cu, if it can be. Blocks as measured at deepconvnet's layers, 100 images, on an H200."""
        forward = which == "forward"
        channels, columns = (self.C, self.F) if forward else (self.F, self.C)
        height, width = (self.OH, self.OW) if forward else (self.H, self.W)
        if forward and self.pooled:
            height, width = height // 2 * 2, width // 2 * 2
        few = channels % STEP != 0
        if self.stride != 1 or height * width < LEAST_PIXELS or width > SMALL_TILE:
            return None
        if (few and not (forward and self.K**2 * channels <= FEW)) or not (forward or aligned):
            return None
        images = max(1, SMALL_TILE // (height * width))
        if images * max(self.H * self.W * self.C, self.OH * self.OW * self.F) >= 2**29:  # 2 bits of 31 are for corners
            return None
        band = height if height * width <= LARGE_TILE else SMALL_TILE // width // 2 * 2  # whole windows
        # Where images are small, a block has few products, but many to add up for each.
        deep = images > 1 and not few and (precision == "float32" or columns <= 32)
        BN, groups = 32 if columns % 32 == 0 and not deep else 16, self.K if deep else 1
        BM, steps = -(-images * band * width // 32) * 32, -(-(self.K**2) * min(channels, STEP) // STEP)
        if band == 0 or BM * BN // 16 * groups > MOST_THREADS:
            return None
        tile = images * (band + self.K - 1) * (width + self.K - 1) * min(channels, STEP) + steps * STEP * BN
        if max(tile + 3, groups * BM * (BN + 1)) > SHARED_NUMBERS:
            return None
        macros = {"BN": BN, "GROUPS": groups, "IMAGES": images, "ROWS": band}
        grid = -(-height // band) * -(-N // images), -(-columns // BN), 1
        defines = self._defines(which, precision, aligned, macros)
        return Plan("direct", defines, grid, BM * BN // 16 * groups, 0)

    def _direct_filters(self, N: int, precision: str) -> Plan | None:
        """By direct_filters.cu, if it can be."""
        taps, few, BN = self.K**2 * self.C, self.C % STEP != 0, 16
        width = -(-self.OW // 4) * 4  # in quads
        if self.stride != 1 or self.OH * self.OW < LEAST_PIXELS or width > SMALL_TILE or (few and taps > FEW):
            return None
        images = max(1, SMALL_TILE // 2 // (self.OH * width))
        band = min(self.OH, max(4, SMALL_TILE // 2 // width // 2 * 2))
        steps, rows = -(-images * band * width // STEP), 16 * (taps // 16 + 1) if few else 16 * self.K**2 + 1
        warps = 1 if few else self.K
        groups = min(MOST_THREADS // 32 // warps, 8 if few else 4, (SHARED_NUMBERS - 4 * steps) // (rows * (BN + 1)))
        x = images * (band + self.K - 1) * (width + self.K - 1) * (self.C if few else PADDED_CHANNELS)
        if groups < 1 or x + 3 + steps * (STEP * (BN + 8) + 4) > SHARED_NUMBERS or band + self.K > 64:
            return None
        if images * (band + self.K) * max(self.W * self.C, self.OW * self.F) >= 2**23:  # 8 bits of 31 are for rows
            return None
        across, tiles = (1 if few else self.C // STEP, -(-self.F // BN)), -(-N // images) * -(-self.OH // band)
        blocks = ENOUGH_BLOCKS if few else ENOUGH_BLOCKS // 2  # of many threads, one on a multiprocessor
        slices = max(1, min(blocks // (across[0] * across[1]), tiles))
        per_slice = -(-tiles // slices)
        macros = {"BN": BN, "GROUPS": groups, "IMAGES": images, "ROWS": band}
        defines = self._defines("filters", precision, True, macros)
        return Plan("direct_filters", defines, (*across, -(-tiles // per_slice)), 32 * warps * groups, per_slice)
