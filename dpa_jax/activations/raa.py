"""RAA: the Response-Adaptive Activation (Qiu et al., ICLR 2024, "Dynamic Neural Response Tuning")."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpa_jax.activations.baselines import Stateless
from dpa_jax.checks import check_choice

BASES = {
    # erfc keeps its digits in the tail, where 1 + erf loses them.
    "gelu": lambda x, shift: 0.5 * x * jax.lax.erfc(-(x + shift) * 0.5**0.5),
    "relu": lambda x, shift: jax.nn.relu(x + shift),
}
"""``f(x, shift)`` of each family: ``x * Phi(x + s)``, with the exact normal CDF, and ``max(0, x + s)``."""


class RAA(Stateless):
    """Response-Adaptive Activation: GELU or ReLU, shifted by what a small linear map makes of the response.

    With ``s`` the shift, the output is ``x * Phi(x + s)`` (base ``"gelu"``; Phi the exact normal CDF) or
    ``max(0, x + s)`` (base ``"relu"``). The parameters are float32 and start at zero, so it starts as its base.

    ================== ======================= ================== ==============
    kind               shift s                 ``shift_kernel``   ``shift_bias``
    ================== ======================= ================== ==============
    ``"vector"``       w.x + b, one a position [C]                []
    ``"scalar"``       b                       none               []
    ``"elementwise"``  xW + b, one a channel   [C_in, C_out]      [C]
    ================== ======================= ================== ==============

    Channels are the last axis: feature maps and tokens are taken alike, in any floating dtype, which is computed in.

    Example::

        act = dpa_jax.RAA()
        variables = act.init(jax.random.key(0), jnp.ones((8, 17, 64)))
        y = act.apply(variables, jnp.ones((8, 17, 64)))

    Attributes:
        kind: ``"vector"`` (the method), ``"scalar"`` or ``"elementwise"`` (DNRT's ablation).
        base: ``"gelu"`` or ``"relu"``.

    Raises:
        ValueError: for another kind or base, and for an input that is not floating.
    """

    kind: str = "vector"
    base: str = "gelu"

    def __post_init__(self):
        check_choice("RAA", "kind", self.kind, ("vector", "scalar", "elementwise"))
        check_choice("RAA", "base", self.base, BASES)
        super().__post_init__()

    @nn.compact
    def _activate(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        bias_shape = (channels,) if self.kind == "elementwise" else ()
        shift = self.param("shift_bias", nn.initializers.zeros, bias_shape, jnp.float32).astype(x.dtype)
        if self.kind == "elementwise":
            kernel = self.param("shift_kernel", nn.initializers.zeros, (channels, channels), jnp.float32)
            projected = x @ kernel.astype(x.dtype)
            shift = projected + jnp.broadcast_to(shift, projected.shape)
        elif self.kind == "vector":
            kernel = self.param("shift_kernel", nn.initializers.zeros, (channels,), jnp.float32)
            shift = (x @ kernel.astype(x.dtype) + shift)[..., None]
        return BASES[self.base](x, shift)
