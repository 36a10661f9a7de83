"""Several training steps in one call of the compiled program: the same bits, records and checkpoints as one by one."""

import json

import chex
import jax
import pytest

from dpa_jax.training.checkpoint import Checkpoints
from dpa_jax.training.loop import train
from dpa_jax.training.run import build
from tests.helpers import tiny_config


def small(**changes):
    """6 steps an epoch; the memories are updated in steps 5 and 10."""
    return tiny_config(model_options__patch_size=8, augment__flip=0.5, **changes)


def trained(run, folder, until=None):
    """The records of each member, without times, and the steps that there are checkpoints of."""
    folders = [folder / str(seed) for seed in run.seeds]
    records = train(run, folder, folders, until=until)
    for member in records:
        for record in member:
            del record["images_per_second"], record["seconds"]
    with Checkpoints(folder / "checkpoints", keep=9, read_only=True) as checkpoints:
        steps = sorted(int(path.name) for path in checkpoints.directory.iterdir() if path.name.isdigit())
        return records, steps, checkpoints.restore(run.abstract_state)[1]


@pytest.mark.parametrize("seeds", [(0,), (0, 1)], ids=["one seed", "two seeds"])
def test_several_steps_a_call_are_the_same_bits(tmp_path, seeds):
    one, four = (build(small(steps_per_dispatch=n), jax.devices()[:1], seeds=seeds) for n in (1, 4))
    records, steps, state = trained(one, tmp_path / "one")
    calls, inner = [], four.steps
    four.steps = lambda state, number, count: calls.append((number, count)) or inner(state, number, count)
    again, same_steps, same_state = trained(four, tmp_path / "four")
    assert calls == [(0, 4), (4, 2), (6, 4), (10, 2)]  # an epoch ends after step 6
    assert four._compiled.several_steps._cache_size() == 1
    assert again == records and same_steps == steps == [6, 12]
    chex.assert_trees_all_equal(same_state, state)
    assert jax.device_get(state.backward_memory["blocks"])  # what could go wrong is there


def test_they_end_where_a_checkpoint_is_due_and_where_time_is_up(tmp_path):
    config = small(steps_per_dispatch=4, checkpoint__every_epochs=2, checkpoint__every_steps=5, checkpoint__keep=9)
    run, asked = build(config, jax.devices()[:1]), []

    def until(evaluates, next_evaluates):
        asked.append((evaluates, next_evaluates))
        return len(asked) == 3

    assert trained(run, tmp_path, until)[1] == [5, 6]  # after 4, 5 and 6 steps; the last as time was up
    assert asked == [(False, False), (False, True), (True, False)]
    assert [json.loads(line)["step"] for line in (tmp_path / "0" / "metrics.jsonl").read_text().splitlines()] == [6]
    assert trained(run, tmp_path)[1] == [5, 6, 10, 12]


def test_examples_that_are_not_on_the_devices_come_one_by_one():
    run = build(small(data__resident="host"))
    assert run.steps_per_dispatch == 1
    run.config.steps_per_dispatch = 2
    with pytest.raises(ValueError, match=r"steps_per_dispatch=2 needs the training examples on the devices"):
        _ = run.steps_per_dispatch
