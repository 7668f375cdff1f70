"""Layers that are a sum of terms: drop-in replacements of `nnx.Conv` and `nnx.Linear`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from math import prod
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Num, Shaped

from solvers.terms import Term
from unified_approx.im2col import Geometry, convolve, normalize, output_shape, patches
from unified_approx.layers.common import TermLayer, check_execution, check_shape, parameter
from unified_approx.layers.kinds import KINDS, layer_class

AUTO = "auto"
MERGED = "merged"
MATMUL = "matmul"
FACTORED = "factored"
_MOST_LISTED = 1024  # combinations of the terms' forms
_COPY = 400  # multiply-adds in the time of one value gathered and its derivative scattered; measured on ResNet-20


class Factored(nnx.Module):
    """y = (sum of terms)(x) + bias. Use `FactoredConv` or `FactoredLinear`.

    Executions, all the same function; `executions()` lists those of this layer:
        merged: the terms' kernels are added up and one dense convolution (product) is run: as fast as the layer was.
        matmul: sliced patches times the merged matrix; for convolutions, where the image is so small (4x4 outputs and
            less) that XLA's CPU convolution is slow.
        factored:FORM+FORM...: every term in a form of its own, in the order of the terms.
    Inputs are promoted as Flax does: to `dtype` when given, else to the common type of input and parameters.

    Attributes:
        terms: the summands' layers.
        bias: (n,) or None.
        geometry, execution, dtype: static.
        removed: how many (input, output) channels the layer replaced had more; static.
    """

    dense: ClassVar[bool]

    def __init__(
        self,
        terms: Sequence[TermLayer],
        bias: nnx.Param[Array] | None,
        geometry: Geometry,
        execution: str = AUTO,
        dtype: DTypeLike | None = None,
        removed: tuple[int, int] = (0, 0),
    ):
        """Sum layers that exist already; usually `from_terms`."""
        self.terms = nnx.List(terms)
        self.bias = nnx.data(bias)
        self.geometry = geometry
        self.dtype = None if dtype is None else jnp.dtype(dtype).name
        self.removed = removed
        self.execution = self._resolve(execution)

    @classmethod
    def from_terms(
        cls,
        terms: Sequence[Term],
        bias: Float[np.ndarray | Array, " n"] | None,
        geometry: Geometry,
        *,
        execution: str = AUTO,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        removed: tuple[int, int] = (0, 0),
    ) -> "Factored":
        """The layer whose matrix is the sum of the terms' matrices. Terms without any value are left out.

        Args:
            terms: what a solve returns.
            bias: (n,), or None for none.
            geometry: of the layer replaced.
            execution: "auto", "merged", "matmul", "factored" (its form of fewest multiply-adds), or a full name from
                `executions()`. "auto" takes the one with the fewest multiply-adds per output; what is fastest is
                another question, which `choose_executions` answers by measurement.
            dtype: of the computation; None promotes.
            param_dtype: of the parameters: float32, bfloat16 or float16.
            removed: how many (input, output) channels the layer replaced had more than the geometry.

        Raises:
            ValueError: terms or bias that do not fit the geometry, an execution this layer does not offer.
        """
        if cls.dense == bool(geometry.window):
            raise ValueError(f"window={geometry.window}: {cls.__name__} is for the other kind; see factored_class")
        geometry = normalize(geometry)
        if bias is not None:
            check_shape("bias", np.asarray(bias), (geometry.c_out,))
        layers = [layer_class(t).from_term(t, geometry, dtype=param_dtype) for t in terms if t.num_params]
        own_bias = None if bias is None else parameter(bias, param_dtype)
        return cls(layers, own_bias, geometry, execution, dtype, removed)

    def __call__(self, x: Num[Array, "*batch c_in"]) -> Float[Array, "*out n"]:
        """The layer applied to x, (*batch, *spatial, c_in), any number of batch axes, as `nnx.Conv` takes them."""
        axes = len(self.geometry.window)
        if x.ndim < axes + 1 or x.shape[-1] != self.geometry.c_in:
            raise ValueError(f"x.shape={x.shape}: need (*batch, {axes} spatial axes, c_in={self.geometry.c_in})")
        dtype = self._compute_dtype(x)
        batch = x.shape[: x.ndim - axes - 1]
        y = self._apply(x.astype(dtype).reshape(-1, *x.shape[x.ndim - axes - 1 :]))
        if self.bias is not None:
            y = y + self.bias[...].astype(dtype)
        return y.reshape(*batch, *y.shape[1:])

    def _compute_dtype(self, x: Array) -> Any:
        if self.dtype is not None:
            return jnp.dtype(self.dtype)
        dtype = jnp.result_type(x, *(p.dtype for p in self._parameters()))
        return dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.promote_types(jnp.float32, dtype)

    def _parameters(self) -> list[Array]:
        arrays = [a for t in self.terms for a in t.tensors().values() if jnp.issubdtype(a.dtype, jnp.inexact)]
        return arrays if self.bias is None else [*arrays, self.bias[...]]

    def _apply(self, x: Array) -> Array:
        if not len(self.terms):
            return jnp.zeros((x.shape[0], *output_shape(x.shape[1:-1], self.geometry), self.geometry.c_out), x.dtype)
        if self.execution == MERGED:
            return convolve(x, self.kernel(x.dtype), self.geometry)
        if self.execution == MATMUL:
            return patches(x, self.geometry) @ self.kernel(x.dtype).reshape(-1, self.geometry.c_out)
        return sum((term(x) for term in self.terms[1:]), start=self.terms[0](x))

    def kernel(self, dtype: DTypeLike | None = None) -> Float[Array, "*window c_in n"]:
        """The dense kernel this layer stands for, formed in `dtype` (the parameters' own by default)."""
        if not len(self.terms):
            return jnp.zeros((*self.geometry.window, self.geometry.c_in, self.geometry.c_out), dtype or jnp.float32)
        return sum((term.kernel(dtype) for term in self.terms[1:]), start=self.terms[0].kernel(dtype))

    def executions(self) -> tuple[str, ...]:
        """Names that `with_execution` takes: merged, matmul (convolutions), and every combination of the terms' forms.

        Of sums of so many terms that the combinations are too many, those in which terms of one kind run alike; the
        others can be asked for.
        """
        forms = [term.executions() for term in self.terms]
        if prod(map(len, forms)) <= _MOST_LISTED:
            combinations = product(*forms)
        else:
            kinds = {term.kind: term.executions() for term in self.terms}
            alike = (dict(zip(kinds, chosen, strict=True)) for chosen in product(*kinds.values()))
            combinations = (tuple(chosen[term.kind] for term in self.terms) for chosen in alike)
        return (*self._whole(), *(_factored_name(c) for c in combinations)) if self._is_sum() else self._whole()

    def _whole(self) -> tuple[str, ...]:
        """The executions that form the matrix."""
        return (MERGED, MATMUL) if self.geometry.window else (MERGED,)

    def _is_sum(self) -> bool:
        """Whether there is anything to run term by term; a dense term would be merged under another name."""
        return len(self.terms) > 1 or (len(self.terms) == 1 and self.terms[0].kind != "dense")

    def _offers(self, execution: str) -> bool:
        """Whether the layer can be run so, listed in `executions` or not."""
        if execution in self._whole():
            return True
        forms = _forms(execution)
        return (
            self._is_sum()
            and execution == _factored_name(forms)
            and len(forms) == len(self.terms)
            and all(form in term.executions() for form, term in zip(forms, self.terms, strict=True))
        )

    def _cheapest(self, cost: Callable[[TermLayer, str], float]) -> str:
        """The factored execution of the least cost, each term by itself; the merged one of a layer that has none."""
        if not self._is_sum():
            return MERGED
        return _factored_name([min(t.executions(), key=partial(cost, t)) for t in self.terms])

    def with_execution(self, execution: str) -> "Factored":
        """The same layer run in another form, sharing the Variables.

        Raises:
            ValueError: a name that is neither "auto", "factored" nor in `executions()`.
        """
        return type(self)(list(self.terms), self.bias, self.geometry, execution, self.dtype, self.removed)

    @property
    def replaces(self) -> Geometry:
        """The geometry of the layer that this one stands for, with the channels removed since."""
        c_in, c_out = self.geometry.c_in + self.removed[0], self.geometry.c_out + self.removed[1]
        return replace(self.geometry, c_in=c_in, c_out=c_out)

    def _resolve(self, execution: str) -> str:
        """The full name that `execution` stands for; gives the terms their forms."""
        if execution in (AUTO, FACTORED):
            factored = self._cheapest(lambda term, form: term.macs_per_position(form))
            choice = [MERGED, factored] if execution == AUTO else [factored]
            execution = min(choice, key=self.macs_per_position)
        if not self._offers(execution):
            check_execution(execution, self.executions())
        if execution not in self._whole():
            pairs = zip(self.terms, _forms(execution), strict=True)
            self.terms = nnx.List(term.with_execution(form) for term, form in pairs)
        return execution

    def macs(self, spatial: Sequence[int], execution: str | None = None) -> int:
        """Multiply-adds for one image of that spatial shape (for a dense layer: one (*spatial, c_in) input)."""
        name = execution or self.execution
        if not len(self.terms):
            return 0
        if name in (MERGED, MATMUL):
            return prod(output_shape(spatial, self.geometry)) * self.geometry.matrix_shape.p * self.geometry.c_out
        forms = _forms(name)
        return sum(t.macs(spatial, form) for t, form in zip(self.terms, forms, strict=True))

    def factored_macs(self, spatial: Sequence[int]) -> int:
        """Multiply-adds for one image in the factored form that has the fewest; of a dense term in the merged form."""
        return self.macs(spatial, self._cheapest(lambda term, form: term.macs(spatial, form)))

    def macs_per_position(self, execution: str | None = None) -> float:
        """Multiply-adds per output position of a large image."""
        name = execution or self.execution
        if not len(self.terms):
            return 0.0
        if name in (MERGED, MATMUL):
            return float(self.geometry.matrix_shape.p * self.geometry.c_out)
        forms = _forms(name)
        return sum(t.macs_per_position(form) for t, form in zip(self.terms, forms, strict=True))

    def execution_for_training(self) -> str:
        """The form of fewest multiply-adds, where a value gathered counts as many; not the product of patches."""
        factored = self._cheapest(lambda term, form: term.macs_per_position(form) + _COPY * term.copies(form))
        return min([MERGED, factored], key=self._training_cost)

    def _training_cost(self, execution: str) -> float:
        if execution == MERGED:
            return self.macs_per_position(execution)
        forms = _forms(execution)
        copies = sum(term.copies(form) for term, form in zip(self.terms, forms, strict=True))
        return self.macs_per_position(execution) + _COPY * copies

    def spec(self) -> dict[str, Any]:
        """JSON-able: everything besides `tensors()` that `from_spec` needs."""
        terms = [term.spec() for term in self.terms]
        parameters = self._parameters()
        param_dtype = parameters[0].dtype.name if parameters else "float32"
        fixed = {"execution": self.execution, "dtype": self.dtype, "param_dtype": param_dtype}
        if any(self.removed):
            fixed["removed"] = self.removed
        return {"geometry": asdict(self.geometry), "terms": terms, **fixed}

    def tensors(self) -> dict[str, Shaped[Array, "..."]]:
        """Everything stored: "terms.0.values", ..., "bias"."""
        named = {f"terms.{i}.{name}": a for i, t in enumerate(self.terms) for name, a in t.tensors().items()}
        return named if self.bias is None else named | {"bias": self.bias[...]}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> "Factored":
        """The layer that `spec()` (also after a trip through JSON) and `tensors()` came from, bit for bit.

        Raises:
            ValueError: an unknown kind of term, tensors that are missing, left over or of the wrong shape.
        """
        geometry = _geometry_from_json(spec["geometry"])
        dtype, left, terms = spec["param_dtype"], dict(tensors), []
        for i, inner in enumerate(spec["terms"]):
            if inner["kind"] not in KINDS:
                raise ValueError(f"kind={inner['kind']!r}: known kinds of term are {', '.join(KINDS)}")
            start = f"terms.{i}."
            own = {name.removeprefix(start): left.pop(name) for name in list(left) if name.startswith(start)}
            terms.append(KINDS[inner["kind"]].from_spec(inner, own, geometry, dtype=dtype))
        bias = left.pop("bias", None)
        if left:
            raise ValueError(f"tensors={sorted(left)}: do not belong to a layer with terms {spec['terms']}")
        if bias is not None:
            check_shape("bias", bias, (geometry.c_out,))
        c_in, c_out = spec.get("removed", (0, 0))
        own_bias = None if bias is None else parameter(bias, dtype)
        return cls(terms, own_bias, geometry, spec["execution"], spec["dtype"], (int(c_in), int(c_out)))


class FactoredConv(Factored):
    """A convolution as a sum of terms; see `Factored`."""

    dense = False


class FactoredLinear(Factored):
    """A dense layer as a sum of terms; see `Factored`."""

    dense = True


def _factored_name(forms: Sequence[str]) -> str:
    return f"{FACTORED}:{'+'.join(forms)}"


def _forms(execution: str) -> list[str]:
    """Of the terms, in their order."""
    return execution.removeprefix(f"{FACTORED}:").split("+")


def factored_class(geometry: Geometry) -> type[Factored]:
    """`FactoredLinear` for a window (), else `FactoredConv`."""
    return FactoredConv if geometry.window else FactoredLinear


def _geometry_from_json(fields: Mapping[str, Any]) -> Geometry:
    """JSON has lists where a geometry has tuples."""
    padding = fields["padding"]
    padding = padding if isinstance(padding, str) else tuple((int(low), int(high)) for low, high in padding)
    tuples = {name: tuple(fields[name]) for name in ("window", "strides", "dilation")}
    return normalize(Geometry(**tuples, c_in=fields["c_in"], c_out=fields["c_out"], padding=padding))


def geometry_of(layer: nnx.Conv | nnx.Linear) -> Geometry:
    """The geometry of an existing Flax layer.

    Raises:
        ValueError: what a `Geometry` cannot say: groups, input dilation, a mask, CIRCULAR/REFLECT/CAUSAL padding.
    """
    if isinstance(layer, nnx.Linear):
        return normalize(Geometry((), layer.in_features, layer.out_features))
    axes = len(layer.kernel_size)
    for name in ("feature_group_count", "input_dilation"):
        if any(v != 1 for v in _per_axis(getattr(layer, name), axes)):
            raise ValueError(f"{name}={getattr(layer, name)}: only 1 is supported; keep this layer as it is")
    if layer.mask is not None:
        raise ValueError("mask: masked convolutions are not supported; keep this layer as it is")
    window, padding = tuple(layer.kernel_size), layer.padding
    if not isinstance(padding, str):
        padding = tuple((p, p) if isinstance(p, int) else tuple(p) for p in _per_axis(padding, axes))
    strides, dilation = _per_axis(layer.strides, axes), _per_axis(layer.kernel_dilation, axes)
    return normalize(Geometry(window, layer.in_features, layer.out_features, strides, padding, dilation))


def _per_axis(value: Any, axes: int) -> tuple[Any, ...]:
    """Flax takes None, one number, or one per axis."""
    return (1 if value is None else value,) * axes if value is None or isinstance(value, int) else tuple(value)
