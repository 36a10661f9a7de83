"""Training: configuration, optimisers, metrics, checkpoints, records and the loop that joins them."""

from dpa_jax.extras import require_train

require_train(__name__)
