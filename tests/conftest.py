"""What every test runs under: eight fake CPU devices and a strict JAX."""

import os
import pathlib
import signal

# JAX reads these when it is imported, so they come first.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# JAX_NUMPY_DTYPE_PROMOTION=strict stays off: flax's LayerNorm promotes bfloat16 to float32 implicitly.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
# Tests compile much and compute little: machine code that is not optimised halves their time. XLA's own passes stay on.
# CI runs the core with XLA_FLAGS set to nothing, on the code that users run.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import numpy as np
import pytest

# A shell's background jobs ignore Ctrl-C, and so would the programs that tests stop with it.
signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = pathlib.Path(__file__).parent / "golden"


def pytest_addoption(parser):
    parser.addoption(
        "--faults-every", type=int, default=1, metavar="N", help="Of the hostile cases, only the first of every N."
    )


def pytest_terminal_summary(terminalreporter, config):
    # Here and not beside the cases: under xdist the process that reports loads no other conftest.py.
    if "not faults" in config.option.markexpr:
        return
    from tests.faults.table import table

    lines = table(report for reports in terminalreporter.stats.values() for report in reports)
    if lines:
        terminalreporter.section("hostile cases")
        terminalreporter.write_line("\n".join(lines))


@pytest.fixture(scope="session", autouse=True)
def _eight_devices() -> None:
    assert jax.default_backend() == "cpu"
    assert jax.device_count() == 8


@pytest.fixture(scope="module")
def compile_quickly():
    """For the tests of a module that compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def golden():
    """golden(name) -> the arrays that the authors' program computed, {entry: numpy array}."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
            return dict(arrays)

    return load
