"""Terms that see a convolution's kernel as a tensor: outputs, window positions, input channels.

`Tucker2` has a small dense core between two changes of channels, `Cp3` and `Cp4` one filter per channel in between: the
layers are a 1x1 convolution, a convolution that may be depthwise, and a 1x1 convolution. Tucker-2: Kim et al. (2016),
Compression of deep convolutional neural networks for fast and low power mobile applications, section 3.2. CP: Lebedev
et al. (2015), Speeding-up convolutional neural networks using fine-tuned CP-decomposition, section 3.2.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float32, Int

from solvers.terms import MatrixShape, channels_of


@dataclass(frozen=True)
class Tucker2:
    """K[o, s, c] = sum_ab last[o, a] core[a, s, b] first[b, c], s the position in the window, row-major."""

    first: Float32[np.ndarray, "r_in c_in"]
    core: Float32[np.ndarray, "r_out places r_in"]
    last: Float32[np.ndarray, "n r_out"]

    @property
    def rank(self) -> int:
        """Of the matrix (n, p): channels after the core."""
        return self.last.shape[1]

    @property
    def num_params(self) -> int:
        """Stored values."""
        return self.first.size + self.core.size + self.last.size

    def index_bits(self, shape: MatrixShape) -> int:
        """No indices."""
        return 0

    def matrix(self, shape: MatrixShape) -> Float32[np.ndarray, "n p"]:
        """The composed kernel as a matrix."""
        return self.last @ (self.core @ self.first).reshape(self.rank, shape.p)

    def with_rows_scaled(self, scale: Float32[np.ndarray, " n"]) -> "Tucker2":
        """Scale the last factor."""
        return replace(self, last=self.last * scale[:, None])

    def with_rows(self, kept: Int[np.ndarray, " k"]) -> "Tucker2":
        """Take the rows of the last factor, and what of the others they use."""
        last = self.last[kept]
        outer = last.any(axis=0)
        core = self.core[outer]
        inner = core.any(axis=(0, 1))
        return Tucker2(self.first[inner], core[:, :, inner], last[:, outer])

    def channels_read(self, shape: MatrixShape) -> Bool[np.ndarray, " c_in"]:
        """Those with a column of the first factor that is not zero."""
        return channels_of(np.any(self.first, axis=0), shape.c_in)

    def with_channels(self, kept: Int[np.ndarray, " k"], shape: MatrixShape) -> "Tucker2":
        """Take the columns of the first factor."""
        return replace(self, first=self.first[:, kept])


@dataclass(frozen=True)
class _Components:
    """Sum of `rank` outer products: what both canonical forms share. Factors have one row per component but `last`."""

    first: Float32[np.ndarray, "r c_in"]

    @property
    def filters(self) -> Float32[np.ndarray, "r places"]:
        """The filter of each channel in between."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        """Components."""
        return self.first.shape[0]

    @property
    def num_params(self) -> int:
        """Stored values."""
        return sum(factor.size for factor in vars(self).values())

    def index_bits(self, shape: MatrixShape) -> int:
        """No indices."""
        return 0

    def matrix(self, shape: MatrixShape) -> Float32[np.ndarray, "n p"]:
        """The composed kernel as a matrix."""
        features = (self.filters[:, :, None] * self.first[:, None, :]).reshape(self.rank, shape.p)
        return self._last @ features

    @property
    def _last(self) -> Float32[np.ndarray, "n r"]:
        return vars(self)["last"]

    def with_rows_scaled(self, scale: Float32[np.ndarray, " n"]) -> "_Components":
        """Scale the last factor."""
        return replace(self, last=self._last * scale[:, None])

    def with_rows(self, kept: Int[np.ndarray, " k"]) -> "_Components":
        """Take the rows of the last factor, and the components that they use."""
        last = self._last[kept]
        live = last.any(axis=0)
        used = {name: factor[live] for name, factor in vars(self).items() if name != "last"}
        return replace(self, **used, last=last[:, live])

    def channels_read(self, shape: MatrixShape) -> Bool[np.ndarray, " c_in"]:
        """Those with a column of the first factor that is not zero."""
        return channels_of(np.any(self.first, axis=0), shape.c_in)

    def with_channels(self, kept: Int[np.ndarray, " k"], shape: MatrixShape) -> "_Components":
        """Take the columns of the first factor."""
        return replace(self, first=self.first[:, kept])


@dataclass(frozen=True)
class Cp3(_Components):
    """K[o, s, c] = sum_r last[o, r] middle[r, s] first[r, c]: one filter of the whole window per component."""

    middle: Float32[np.ndarray, "r places"]
    last: Float32[np.ndarray, "n r"]

    @property
    def filters(self) -> Float32[np.ndarray, "r places"]:
        """As stored."""
        return self.middle


@dataclass(frozen=True)
class Cp4(_Components):
    """K[o, (i, j), c] = sum_r last[o, r] height[r, i] width[r, j] first[r, c], for 2-D convolutions."""

    height: Float32[np.ndarray, "r kh"]
    width: Float32[np.ndarray, "r kw"]
    last: Float32[np.ndarray, "n r"]

    @property
    def filters(self) -> Float32[np.ndarray, "r places"]:
        """Outer products of column and row."""
        return (self.height[:, :, None] * self.width[:, None, :]).reshape(self.rank, -1)
