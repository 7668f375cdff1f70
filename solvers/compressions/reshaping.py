"""Which matrix a convolution is taken for."""

from dataclasses import dataclass

from jaxtyping import Array, Float

SCHEMES = ("rows", "spatial")


def check_scheme(scheme: str, *, auto: bool = True) -> None:
    """Raise a ValueError for an unknown scheme."""
    known = (*SCHEMES, "auto") if auto else SCHEMES
    if scheme not in known:
        raise ValueError(f"scheme: {scheme!r} is unknown; choose one of {', '.join(known)}")


@dataclass(frozen=True)
class Reshaping:
    """A layer's (n, p) matrix in another shape, a view of the same values.

    Attributes:
        scheme: "rows": (n, kh kw c), a kh x kw convolution to r channels, then 1 x 1. "spatial": (n kh, kw c), a 1 x kw
            convolution to r channels, then kh x 1.
        window: (kh, kw), which "spatial" needs.
    """

    scheme: str = "rows"
    window: tuple[int, ...] = ()

    @property
    def is_spatial(self) -> bool:
        """Whether the shape is another one than the layer's."""
        return self.scheme == "spatial"

    def shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Of the matrix that an (n, p) matrix becomes.

        Raises:
            ValueError: "spatial" without the window of a 2-D convolution, or "auto", which is settled by `bind`.
        """
        n, p = shape
        if not self.is_spatial:
            check_scheme(self.scheme, auto=False)
            return n, p
        if len(self.window) != 2 or p % self.window[0]:
            raise ValueError(
                f"window: {self.window} for {p} columns; scheme='spatial' needs the (kh, kw) of a convolution"
            )
        return n * self.window[0], p // self.window[0]

    def apply(self, w: Float[Array, "n p"]) -> Float[Array, "rows columns"]:
        """The matrix in the other shape."""
        return w.reshape(self.shape(w.shape))

    def undo(self, w: Float[Array, "rows columns"]) -> Float[Array, "n p"]:
        """Back."""
        rows, columns = w.shape
        across = self.window[0] if self.is_spatial else 1
        return w.reshape(rows // across, columns * across)
