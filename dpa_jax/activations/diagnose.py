"""What is wrong where a mechanism does nothing: told from the variables before and after a few training steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dpa_jax.activations.mechanism import Mechanism
from dpa_jax.activations.penalties import RECORDS, Record, summarize
from dpa_jax.activations.registry import mechanisms

Arrays = dict[str, np.ndarray]


def diagnose(before: Mapping[str, Any], after: Mapping[str, Any], *mutated: Mapping[str, Any]) -> list[str]:
    """What is wrong with the mechanisms of a model, a line each with the module's path and a remedy; empty if nothing.

    Example::

        before = variables
        for batch in batches[:10]:
            variables, mutated = train_step(variables, batch)
        for line in dpa_jax.diagnose(before, variables, mutated):
            print(line)

    Found are memories that never moved, that left their range or are not finite, penalties that are always zero, places
    whose channels are never on, modules that one call of the model uses several times, labels that are no class, and
    records that never came out. Nothing is computed on the devices.

    Args:
        before: the variables of a linen model, its collections, before some training steps; more of them than the
            mechanisms' ``update_interval``.
        after: those after them.
        *mutated: the second results of `apply`, of some of the steps, as `penalties` takes them. Without any, what
            only records tell is not looked for.

    Raises:
        ValueError: if there is no variable of a mechanism in ``after``.
    """
    found = [(path, mechanism, arrays) for path, mechanism, arrays in _modules(after)]
    if not found:
        raise ValueError(
            "diagnose: no variable of a mechanism is in what is given; pass every collection that model.init returned"
        )
    earlier = {(path, mechanism): arrays for path, mechanism, arrays in _modules(before)}
    messages = []
    for path, mechanism, arrays in found:
        where = f"{mechanism.__name__} {path!r}"
        messages += [f"{where}: {text}" for text in _of_state(mechanism, earlier.get((path, mechanism)), arrays)]
    return messages + (_of_records(found, mutated) if mutated else [])


def _of_state(mechanism: type[Mechanism], before: Arrays | None, after: Arrays) -> list[str]:
    """What the variables of one module tell."""
    messages = []
    backward = {key for key, variable in mechanism.kept.items() if variable.collection == "backward_memory"}
    updated = {key for key, variable in mechanism.kept.items() if variable.collection != "params"} - backward
    moved = {key for key in after if before is None or not np.array_equal(before[key], after[key], equal_nan=True)}
    if updated and not moved & updated:
        messages.append(
            "it has remembered nothing. Call it with labels and train=True, or the model inside of "
            "dpa_jax.supervise(labels, train=True); pass mutable=dpa_jax.MUTABLE to apply, and keep what it returns"
        )
    elif backward and not moved & backward and any(after[key].ndim > 0 for key in moved & updated):
        messages.append(
            "its backward memory never moved. The gradient with respect to it is its update: "
            "jax.grad(loss_fn, argnums=(0, 1)) of parameters and backward memory, dpa_jax.nnx.value_and_grad in NNX"
        )
    for key in sorted(backward):
        largest = np.max(np.abs(after[key]), initial=0.0)
        if largest > 1.001:
            messages.append(
                f"its backward memory, a mean of signs, is {largest:.4g} at its largest. Add its gradient to it as it "
                "is, with dpa_jax.apply_updates or optax.identity(): no optimizer, no sum over steps"
            )
    for key, value in after.items():
        if not np.all(np.isfinite(value)):
            messages.append(f"{key} is not finite. A batch was not, or the parameters are not; start from a checkpoint")
    return messages


def _of_records(found: list[tuple[str, type[Mechanism], Arrays]], mutated: tuple[Mapping[str, Any], ...]) -> list[str]:
    """What the records of some calls tell."""
    messages: list[str] = []
    on: dict[str, bool] = {}
    uses: Counter[tuple[int, str]] = Counter()
    for call, result in enumerate(mutated):
        for path, record in _records(result):
            uses[call, path] += 1
            owner = f"{type(record.settings).__name__} {path!r}"
            seen = record.seen if isinstance(record.seen, Mapping) else {}
            if "labels" in seen:
                labels, classes = np.asarray(record.labels), getattr(record.settings, "num_classes", 0)
                if np.any(wrong := (labels < -1) | (labels >= classes)):
                    messages.append(
                        f"{owner}: the label {labels[wrong].flat[0]} is no class of 0..{classes - 1}, and not -1, "
                        "which leaves a sample out; such samples take no part"
                    )
                if count := np.sum((labels >= 0) & (labels < classes) & (np.asarray(seen["labels"]) < 0)):
                    messages.append(
                        f"{owner}: the values of {count} labelled samples were not finite; such samples take no part. "
                        "Look for NaN in the inputs, or for parameters that have grown too large"
                    )
            if "values" in seen:
                values = np.asarray(seen["values"])
                layers = values.shape[: record.mark.ndim]
                active = np.any(values > getattr(record.settings, "tau", 0.0), axis=(-2, -1))
                for layer in np.ndindex(layers):
                    place = ", ".join([owner, *(f"layer {index}" for index in layer)])
                    on[place] = on.get(place, False) or bool(active[layer])
    seen_paths = dict.fromkeys(path for _, path in uses)
    for path, mechanism, _ in found:
        if mechanism.class_wise and path not in seen_paths:
            messages.append(
                f"{mechanism.__name__} {path!r}: it has recorded nothing. No labels reached it, the collection "
                f"{RECORDS!r} was not mutable, or a function that drops it is in between, such as an inner jit"
            )
    most = {path: max(n for (_, p), n in uses.items() if p == path) for path in seen_paths}
    messages += [
        f"{path!r} is called {times} times in one call of the model, and all share one memory. Make a module for each "
        "place if they are not the same channels"
        for path, times in most.items()
        if times > 1
    ]
    messages += [
        f"{owner}: none of its channels was ever on; nothing passes this place any more, and nothing can be masked. A "
        "lower learning rate or a warm-up keeps it alive"
        for owner, active in on.items()
        if not active
    ]
    totals: dict[str, float] = {}
    for result in mutated:
        for name, value in summarize(result).penalties().items():
            totals[name] = totals.get(name, 0.0) + float(value)
    messages += [
        f"the penalty {name!r} is zero in all of the {len(mutated)} calls given. Where this stays so, the loss has "
        "nothing of the mechanism in it: look at masked_fraction, and train for some epochs before it is judged"
        for name, total in totals.items()
        if total == 0
    ]
    return messages


def _modules(variables: Mapping[str, Any]) -> list[tuple[str, type[Mechanism], Arrays]]:
    """Every module whose variables are all there: its path, its mechanism, and {key of ``kept``: array}."""
    trees = {name: _flat(tree) for name, tree in variables.items()}
    found = []
    for mechanism in mechanisms():
        kept = {key: v for key, v in mechanism.kept.items() if v.collection != "params"}
        if not kept:
            continue
        first = next(iter(kept.values()))
        for path, name in trees.get(first.collection, {}):
            places = {key: (path, v.name) for key, v in kept.items()}
            if name == first.name and all(places[key] in trees.get(v.collection, {}) for key, v in kept.items()):
                arrays = {key: np.asarray(trees[v.collection][places[key]]) for key, v in kept.items()}
                found.append((path, mechanism, arrays))
    return found


def _flat(tree: Any) -> dict[tuple[str, str], Any]:
    """{(path of the module, name): array} of a collection."""
    flat = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *path, name = (jax.tree_util.keystr((key,), simple=True) for key in keys)
        flat["/".join(path), name] = leaf
    return flat


def _records(mutated: Mapping[str, Any]) -> list[tuple[str, Record]]:
    """The records of a call, with the path of the module that made them."""
    leaves = jax.tree_util.tree_leaves_with_path(mutated.get(RECORDS, {}), is_leaf=lambda x: isinstance(x, Record))
    found = []
    for keys, leaf in leaves:
        if isinstance(leaf, Record):
            names = [str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey)]
            found.append(("/".join(name for name in names if name not in ("record", "records")), leaf))
    return found
