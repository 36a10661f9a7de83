"""Several training steps in one call of the compiled program: the figures of one by one, wherever they are cut."""

import json

import chex
import jax
import pytest

from dpa_jax.training.checkpoint import Checkpoints
from dpa_jax.training.loop import train
from dpa_jax.training.run import build
from tests.helpers import tiny_config

pytestmark = pytest.mark.usefixtures("compile_quickly")


def small(**changes):
    """6 steps an epoch; the memories are updated in steps 5 and 10."""
    return tiny_config(model_options__patch_size=8, augment__flip=0.5, checkpoint__keep=9, **changes)


def trained(run, folder, until=None):
    """The records of each member, without times, the steps that there are checkpoints of, and the newest state."""
    folders = [folder / str(seed) for seed in run.seeds]
    records = train(run, folder, folders, until=until)
    for member in records:
        for record in member:
            del record["images_per_second"], record["seconds"]
    with Checkpoints(folder / "checkpoints", keep=9, read_only=True) as checkpoints:
        steps = sorted(int(path.name) for path in checkpoints.directory.iterdir() if path.name.isdigit())
        return records, steps, checkpoints.restore(run.abstract_state)[1]


def test_several_steps_a_call_give_the_same_figures(tmp_path):
    one, four = (build(small(steps_per_dispatch=n), jax.devices()[:1], seeds=(0, 1)) for n in (1, 4))
    records, steps, _ = trained(one, tmp_path / "one")
    calls, inner = [], four.steps
    four.steps = lambda state, number, count: calls.append((number, count)) or inner(state, number, count)
    again, same_steps, _ = trained(four, tmp_path / "four")
    assert calls == [(0, 4), (4, 2), (6, 4), (10, 2)]  # an epoch ends after step 6
    assert four._compiled.several_steps._cache_size() == 1
    assert same_steps == steps == [6, 12]
    for mine, theirs in zip(again, records, strict=True):
        for record, wanted in zip(mine, theirs, strict=True):
            # In a loop the compiler rounds otherwise.
            assert record == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_cut_anywhere_they_go_on_with_the_same_bits(tmp_path):
    config = small(steps_per_dispatch=4, checkpoint__every_epochs=2)
    run, asked = build(config, jax.devices()[:1]), []

    def until(evaluates, next_evaluates):
        asked.append((evaluates, next_evaluates))
        return len(asked) == 3

    records, steps, state = trained(run, tmp_path / "whole")
    assert steps == [12]
    run.config.checkpoint.every_steps = 5
    assert trained(run, tmp_path / "cut", until)[1] == [5, 6]  # after 4, 5 and 6 steps; the last as time was up
    assert asked == [(False, False), (False, True), (True, False)]
    lines = (tmp_path / "cut" / "0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [6]
    again, steps, same_state = trained(run, tmp_path / "cut")
    assert steps == [5, 6, 10, 12]
    assert again[0][1] == records[0][1]  # of the first, the times were kept
    chex.assert_trees_all_equal(same_state, state)


def test_examples_that_are_not_on_the_devices_come_one_by_one():
    run = build(small(data__resident="host"))
    assert run.steps_per_dispatch == 1
    run.config.steps_per_dispatch = 2
    with pytest.raises(ValueError, match=r"steps_per_dispatch=2 needs the training examples on the devices"):
        _ = run.steps_per_dispatch
