"""How the examples of a source come to the devices, batch by batch."""

from dpa_jax.extras import require_train

require_train(__name__)
