"""What is known of a network's layers: those that can be replaced, those that cannot, and what one of them sees."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, Int

from solvers.activation import Activation
from unified_approx.im2col import Geometry

Path = tuple[str | int, ...]
"""Attribute names, list positions and dict keys that lead from a network to one of its modules."""


def path_name(path: Path) -> str:
    """The path as one string, parts joined by "/"."""
    return "/".join(map(str, path))


@dataclass(frozen=True, eq=False)
class LayerSite:
    """A layer that can be replaced, and what follows it up to its activation.

    The network computes h = z + offset and then activation(h), with z = scale * (x * kernel) + shift per output
    channel: own bias and batch norm, or any other scale and shift, in one.

    Attributes:
        path: of the module (the first one, if it is shared).
        homes: all paths of the module.
        kind: "conv" or "linear".
        geometry: of the module.
        activation: what follows; `IDENTITY` where nothing elementwise was found.
        num_calls: how often one forward pass calls the module.
        norm: path of the `nnx.BatchNorm` that the layer's replacement takes over, if any.
        scale: of the whole epilogue.
        shift: of the whole epilogue.
        outer_scale: of what the network itself still applies, z = outer_scale * module(x) + outer_shift: ones,
            unless a norm that could not be folded or a hand-written scale follows.
        outer_shift: likewise; zeros.
        has_offset: whether the network adds another branch before the activation.
    """

    path: Path
    homes: tuple[Path, ...]
    kind: Literal["conv", "linear"]
    geometry: Geometry
    activation: Activation
    num_calls: int
    norm: Path | None
    scale: Float[np.ndarray, " n"]
    shift: Float[np.ndarray, " n"]
    outer_scale: Float[np.ndarray, " n"]
    outer_shift: Float[np.ndarray, " n"]
    has_offset: bool

    @property
    def name(self) -> str:
        """The path as one string."""
        return path_name(self.path)


@dataclass(frozen=True)
class Skipped:
    """A module with weights that cannot be replaced.

    Attributes:
        path: of the module; () for weights that belong to no module of the network.
        kind: name of its class.
        reason: why, for people.
    """

    path: Path
    kind: str
    reason: str

    @property
    def name(self) -> str:
        """The path as one string."""
        return path_name(self.path)


@dataclass(frozen=True, eq=False)
class Observation:
    """What a layer sees and what is wanted of it. The target is activation(response), the linear one response - offset.

    N counts images times calls times the leading axes that the network merged with the images, in this order: calls
    slowest. `spatial` and `out` are the axes between the first and the last: the image's, or none, or a sequence's.

    Attributes:
        x: the layer's input in the network compressed so far, before padding.
        response: h of the original network, its own offset included.
        offset: what the network compressed so far adds before the activation, None if nothing.
        image_index: the image that each of the N entries belongs to.
    """

    x: Float32[np.ndarray, "N *spatial c_in"]
    response: Float32[np.ndarray, "N *out c_out"]
    offset: Float32[np.ndarray, "N *out c_out"] | None
    image_index: Int[np.ndarray, " N"]
