"""Optional dependencies: a missing one is one line that names the extra to install."""

import importlib.util
import sys
from collections.abc import Sequence

# What `pip install 'dpa_jax[train]'` brings, by the names under which it is imported.
TRAIN = ["array_record", "etils", "matplotlib", "ml_collections", "orbax", "PIL", "platformdirs", "pyarrow", "sklearn"]
TRAIN += ["safetensors", "tensorboardX", "tqdm"]


def require_train(package: str, names: Sequence[str] = TRAIN) -> None:
    """Raises ImportError, which says that ``package`` needs it, unless all of ``names`` is installed.

    Where a command of dpa_jax is being run (``python -m dpa_jax.compare``), it ends with the error as its one line.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        message = f"{package} needs {', '.join(missing)}: pip install 'dpa_jax[train]'"
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        # While Python looks for the module after -m there is no spec, and "-m" stands for its file.
        if sys.argv[:1] == ["-m"] or (spec and spec.name.startswith("dpa_jax.")):
            sys.exit(f"error: {message}")
        raise ImportError(message, name=package)
