"""Training: configuration, optimisers, metrics, checkpoints, records and the loop that joins them."""
