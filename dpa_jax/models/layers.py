"""Parts that several models share."""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dpa_jax.activations import Mechanism
from dpa_jax.activations import activation as make_activation
from dpa_jax.activations.sharding import on_auto_axes, spec
from dpa_jax.checks import INT32, as_array, check_call, check_sizes

# The papers' programs cut this normal at +-2, a hundred standard deviations out.
normal_init = nn.initializers.normal(0.02)
Dense = functools.partial(nn.Dense, kernel_init=normal_init)
# Two passes over the features: the fast variance, E[x^2] - E[x]^2, loses digits.
LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)


class Model(nn.Module):
    """Base class of models that classify: the attributes that all have, and their checks.

    They are called as ``model(inputs, labels, train)``, with labels for mechanisms (-1 leaves a sample out, None is
    inference), and return logits [..., K] float32. ``example_inputs`` are the shapes and dtypes of their inputs.

    Attributes:
        num_classes: K, the width of the logits.
        activation: factory of activation modules, which are called as ``module(x, labels, train)``; None: ``native``.
        native: factory of the model's own activation, which stays where ``activation`` is not put.
        activation_places: where ``activation`` is put: ``"all"``, ``"last"`` (the last block of a CNN, as DPA's
            authors have it), or patterns of the activations' paths between commas, as `fnmatch` has them. A path is
            that of the variables, such as ``stage3_block1/activation2``.
        arr: whether an `ARR` follows every block, layer or stage (DNRT).
        dtype: compute dtype; parameters, statistics and logits are float32.

    Raises:
        ValueError: for a size that is no whole number from 1, and for places that the model does not have.
        TypeError: for an activation that makes no modules.
    """

    num_classes: int
    activation: Callable[..., nn.Module] | None = None
    native: Callable[..., nn.Module] = make_activation("relu")
    activation_places: str = "all"
    arr: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self):
        owner = type(self).__name__
        check_sizes(owner, {"num_classes": self.num_classes}, high=INT32)
        check_makes_modules(owner, "native", self.native)
        if self.activation is not None:
            check_makes_modules(owner, "activation", self.activation)
        if not isinstance(self.activation_places, str):
            raise ValueError(f"{owner}: activation_places must be text; got {self.activation_places!r}")
        if self.activation_places == "last" and not self.last_places:
            raise ValueError(
                f"{owner}: activation_places must be 'all' or patterns; its blocks are one loop and have no last one"
            )
        check_floating(owner, self.dtype)
        super().__post_init__()

    @property
    def last_places(self) -> tuple[str, ...]:
        """What ``activation_places="last"`` means, as patterns; none where the model offers it not."""
        return ()

    @property
    def placement(self) -> "Placement":
        """For the modules of this model: which activation is where. Made anew for each call of the model."""
        given = {"all": ("*",), "last": self.last_places}.get(self.activation_places)
        patterns = given or tuple(place.strip() for place in self.activation_places.split(","))
        return Placement(self.native, self.activation, patterns, self.path)


class ImageModel(Model):
    """Base class of models that classify images, normalised images [B, H, W, C], one label a sample.

    Attributes (besides those of `Model`):
        image_size: height and width of the images, in pixels.
        in_channels: channels of the images.

    Raises:
        ValueError: as `Model`, and for images of another shape.
    """

    image_size: int = 32
    in_channels: int = 3

    def __post_init__(self):
        owner = type(self).__name__
        check_sizes(owner, {"image_size": self.image_size, "in_channels": self.in_channels})
        super().__post_init__()

    @property
    def example_inputs(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of one normalised image, with a batch axis of 1: [1, H, W, C] float32."""
        return jax.ShapeDtypeStruct((1, self.image_size, self.image_size, self.in_channels), jnp.float32)

    def checked(self, images: Any) -> jax.Array:
        """The images in the compute dtype; ValueError unless they are a batch like `example_inputs`, and real."""
        owner, shape = type(self).__name__, self.example_inputs.shape[1:]
        images = as_array(owner, "images", images)
        if images.ndim != len(shape) + 1 or images.shape[1:] != shape:
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"{owner}: images must be [B, {wanted}]; got {images.shape}")
        if jnp.iscomplexobj(images):
            raise ValueError(f"{owner}: images must be real; got {images.dtype}")
        return images.astype(self.dtype)


def check_floating(owner: str, dtype: Any) -> None:
    """Raises ValueError unless the dtype, an object or a name, is floating."""
    try:
        floating = dtype is not None and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(f"{owner}: dtype must be floating; got {dtype}")


def check_makes_modules(owner: str, name: str, factory: Any) -> None:
    """Raises TypeError unless ``factory`` can be called as ``factory(name=...)``, as one of modules is."""
    what = f"{owner}: {name} must be a factory of modules, such as dpa_jax.activation('relu')"
    if not callable(factory) or isinstance(factory, nn.Module):
        raise TypeError(f"{what}; got {factory!r}")
    check_call(f"{what}; {factory!r}", factory, name="")


def uniform_conv(features: int, in_features: int, size: int, **options: Any) -> nn.Conv:
    """A convolution whose kernel and bias start as PyTorch's: uniform in +-1/sqrt(fan_in).

    ``in_features`` are those of a group.
    """
    return nn.Conv(features, (size, size), **_uniform(size * size * in_features), **options)


def uniform_dense(features: int, in_features: int, **options: Any) -> nn.Dense:
    """A dense layer whose kernel and bias start as PyTorch's: uniform in +-1/sqrt(fan_in)."""
    return nn.Dense(features, **_uniform(in_features), **options)


def _uniform(fan_in: int) -> dict[str, Any]:
    bound = fan_in**-0.5
    return {
        "kernel_init": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
        "bias_init": lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound),
    }


@dataclasses.dataclass(frozen=True)
class Placement:
    """Which activation is where in a model: the chosen one at the paths that a pattern fits, the native one elsewhere.

    A module calls it for each of its activations, in place of an activation.

    Attributes:
        native: factory of the model's own activation.
        chosen: factory of the other one, or None.
        patterns: of paths relative to the model, as `fnmatch` has them.
        root: path of the model.
        places: every path that was asked for, and whether the chosen one is there.
    """

    native: Callable[..., nn.Module]
    chosen: Callable[..., nn.Module] | None
    patterns: tuple[str, ...]
    root: tuple[str, ...]
    places: dict[str, bool] = dataclasses.field(default_factory=dict, compare=False)

    def __call__(
        self,
        module: nn.Module,
        x: jax.Array,
        labels: jax.Array | None,
        train: bool,
        *,
        pool: str,
        name: str = "activation",
        rows_per_sample: int = 1,
        samples: jax.Array | None = None,
    ) -> jax.Array:
        """Calls the activation ``name`` of a module; a mechanism is told how this place pools, as `activate` has it."""
        path = "/".join((*module.path[len(self.root) :], name))
        fits = any(fnmatch.fnmatchcase(path, pattern) for pattern in self.patterns)
        self.places[path] = fits
        factory = self.chosen if fits and self.chosen is not None else self.native
        return activate(factory(name=name), x, labels, train, pool, rows_per_sample, samples)

    def check(self, owner: str) -> None:
        """Raises ValueError if the chosen activation is nowhere; to be called when all modules have been."""
        if self.chosen is not None and not any(self.places.values()):
            raise ValueError(
                f"{owner}: activation_places {', '.join(self.patterns)} fits none of its activations: "
                f"{', '.join(self.places)}"
            )


def activate(
    module: nn.Module,
    x: jax.Array,
    labels: jax.Array | None,
    train: bool,
    pool: str,
    rows_per_sample: int = 1,
    samples: jax.Array | None = None,
) -> jax.Array:
    """Calls an activation; a mechanism is told how this place pools, unless its own ``pool`` is set."""
    if not isinstance(module, Mechanism):
        return module(x, labels, train)
    own = getattr(module, "pool", None)
    how = pool if own is None else None
    return module(x, labels, train, pool=how, rows_per_sample=rows_per_sample, samples=samples)


class Dropout(nn.Dropout):
    """Flax's, on Explicit mesh axes too: its mask is not spread over the devices as the input is."""

    def __call__(self, inputs: Any, deterministic: bool | None = None, rng: jax.Array | None = None) -> Any:
        """As flax's: [...] -> [...], with some of the values zero and the others scaled up, unless deterministic."""
        if deterministic or self.rate == 0:
            return inputs
        drop, key = super().__call__, self.make_rng(self.rng_collection) if rng is None else rng
        return on_auto_axes(lambda x, key: drop(x, deterministic, key), inputs, key, specs=lambda _: spec(inputs))


class Embed(nn.Embed):
    """Flax's, on Explicit mesh axes too: a row is spread over the devices as its number is."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Integers [B, ...] -> rows [B, ..., features]; NaN where there is no such row."""
        table = self.embedding.astype(self.dtype or self.embedding.dtype)
        rows = functools.partial(jnp.take, axis=0)
        return on_auto_axes(rows, table, inputs, specs=lambda _: PartitionSpec(*spec(inputs), None))


def drop_path(module: nn.Module, x: jax.Array, rate: jax.typing.ArrayLike | None, train: bool) -> jax.Array:
    """Stochastic depth (Huang et al., 2016): drops a residual branch [B, ...] for whole samples, scales up the others.

    In training only, with the calling module's ``dropout`` key. The rate may be traced (a scanned block's); None is 0.
    """
    if rate is None or not train:
        return x
    keep = 1.0 - rate
    kept = jax.random.bernoulli(module.make_rng("dropout"), keep, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(kept, x / keep, 0.0).astype(x.dtype)


def repeat(block: type[nn.Module], length: int, scan: bool | None, remat: bool, shared: int = 2) -> Callable[..., Any]:
    """A class of ``length`` equal blocks, one after the other, each with its own variables and random draws.

    Every variable gets a leading axis of the blocks, in whatever collection. That, and what is computed, does not
    depend on ``scan``: checkpoints of one form serve the other. True compiles one block and loops over it, False
    compiles all of them, None is True, except on TPUs: ``benchmarks/scan.py`` compares the forms.

    A block is called as ``block(...)(x, own, labels, train)``, where ``own`` is its part of an array (or pytree) with a
    leading axis of length ``length``; it returns ``(x, None)``, and so do the class's modules. ``shared`` is the number
    of arguments after ``own``.

    With ``remat`` only the blocks' inputs are kept for the gradient, and what is in a block is computed again.
    """
    if scan is None:
        scan = jax.default_backend() != "tpu"
    if remat:
        block = nn.remat(block, prevent_cse=not scan, static_argnums=4)  # `train`; the module itself is 0
    return nn.scan(
        block,
        variable_axes={True: 0},
        split_rngs={True: True},
        in_axes=(0, *[nn.broadcast] * shared),
        length=length,
        unroll=1 if scan else length,
    )
