"""Trains and evaluates; the same as python -m dpa_jax.train."""

from dpa_jax.train import main

if __name__ == "__main__":
    main()
