"""A state that is shared among the devices: the rule, and a run that computes, saves and goes on as any other."""

import chex
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dpa_jax.training import sharding
from dpa_jax.training.checkpoint import Checkpoints
from dpa_jax.training.continuation import check_unchanged, write_config
from dpa_jax.training.cost import count_collectives
from dpa_jax.training.run import build
from tests.helpers import tiny_config

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(autouse=True)
def _small_arrays_too(monkeypatch):
    monkeypatch.setattr(sharding, "LEAST", 64)


def fsdp(**changes):
    return tiny_config(sharding="fsdp", **changes)


@pytest.mark.parametrize(
    ("shape", "devices", "expected"),
    [
        ((), 4, ()),
        ((8, 4), 4, ()),  # small
        ((64, 32), 4, ("data", None)),
        ((32, 64), 4, (None, "data")),
        ((64, 64), 4, (None, "data")),
        ((12, 1000, 768), 8, (None, "data", None)),
        ((12, 1000, 768), 256, (None, None, "data")),
        ((21843, 768), 256, (None, "data")),
        ((101, 103), 2, ()),
        ((64, 32), 1, ()),
    ],
)
def test_the_longest_axis_that_the_devices_divide_is_shared(shape, devices, expected):
    assert sharding.spec(shape, devices) == PartitionSpec(*expected)


@pytest.fixture(scope="module")
def runs():
    """Runs on eight devices, {config.sharding: (run, state before, metrics of its steps, state after)}."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "LEAST", 64)
        for how in ("data", "fsdp"):
            run = build(tiny_config(sharding=how, model_options__dropout=0.1, model_options__arr=True))
            before, metrics, state = run.init(), [], run.init()
            for step in range(12):  # the memories are updated in the fifth and in the tenth
                state, seen = run.step(state, step)
                metrics.append(jax.device_get(seen))
            found[how] = run, before, metrics, state
    return found


def test_parameters_moments_and_memories_are_shared_and_begin_alike(runs):
    (_, whole, _, _), (run, before, _, after) = runs["data"], runs["fsdp"]
    chex.assert_trees_all_equal(jax.device_get(whole), jax.device_get(before))
    for state in (before, after):
        kernel = state.params["blocks"]["mlp"]["expand"]["kernel"]
        assert kernel.sharding.spec == PartitionSpec(None, None, "data")
        moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == kernel.shape]
        memory = state.model_state["forward_memory"]["blocks"]["mlp"]["activation"]["mean"]
        shared = [kernel, *moments, memory, *jax.tree.leaves(state.backward_memory)]
        assert len(shared) == 5
        for leaf in shared:
            assert leaf.addressable_shards[0].data.nbytes * 8 == leaf.nbytes
        assert state.step.sharding.is_fully_replicated
    # What the devices have of it says how much they need.
    mine = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(after))
    assert sharding.bytes_per_device(run.abstract_state) == mine


def test_a_shared_state_computes_as_a_whole_one(runs):
    (_, _, whole_metrics, whole), (run, _, metrics, shared) = runs["data"], runs["fsdp"]
    for step, (wanted, found) in enumerate(zip(whole_metrics, metrics, strict=True), start=1):
        for name in ("loss", "loss_cross_entropy", "loss_channel", "loss_arr"):
            np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-5, err_msg=f"{name} at step {step}")
    assert metrics[-1]["masked_fraction"] > 0
    memories = [jax.device_get((state.backward_memory, state.model_state)) for state in (whole, shared)]
    chex.assert_trees_all_close(*memories, rtol=0, atol=1e-4)
    assert run.diagnose(shared) == []


def test_a_checkpoint_goes_to_any_number_of_devices_and_either_sharding(runs, tmp_path):
    _, _, _, state = runs["fsdp"]
    expected, step = jax.device_get(state), int(state.step)
    for number, (how, devices) in enumerate([("data", 1), ("fsdp", 4), ("fsdp", 8)]):
        with Checkpoints(tmp_path / str(number), keep=1) as checkpoints:
            checkpoints.save(step, state)
            checkpoints.wait()
            options = runs["fsdp"][0].config.copy_and_resolve_references()
            options.sharding = how
            run = build(options, jax.devices()[:devices])
            _, state = checkpoints.restore(run.abstract_state)
        chex.assert_trees_all_equal(jax.device_get(state), expected)
        shared = state.params["blocks"]["mlp"]["expand"]["kernel"].sharding
        assert (len(shared.device_set), shared.is_fully_replicated) == (devices, how == "data")


def test_a_run_may_go_on_with_the_other_sharding(tmp_path):
    write_config(tiny_config(), tmp_path, 48)
    assert check_unchanged(fsdp(), tmp_path, 48) == ["note: sharding was 'data' and is 'fsdp' now"]


def test_members_micro_batches_and_a_shared_state_go_together():
    small = {"batch_size": 16, "model_options__patch_size": 8, "optimizer__name": "sgd"}
    run = build(fsdp(accumulate=2, **small), jax.devices()[:2], seeds=(0, 1))
    member = build(tiny_config(seed=1, **small), jax.devices()[:2])
    states, state = run.init(), member.init()
    for step in range(2):
        states, metrics = run.step(states, step)
        state, wanted = member.step(state, step)
    assert states.params["blocks"]["mlp"]["expand"]["kernel"].sharding.spec == PartitionSpec(None, None, None, "data")
    assert run.members(metrics)[1]["loss"] == pytest.approx(float(wanted["loss"]), abs=1e-5)
    (_, (_, figures)), (_, (expected,)) = run.evaluate(states), member.evaluate(state)
    assert figures["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("seeds", "changes", "expected"),
    [
        (1, {}, ()),
        (16, {}, ("data",)),
        (12, {}, (None,)),
        (16, {"sharding": "fsdp"}, (None,)),
        (16, {"accumulate": 2}, (None,)),
    ],
)
def test_members_have_devices_of_their_own_where_these_divide_them(seeds, changes, expected):
    config = tiny_config(**changes)
    assert sharding.of_members(seeds, sharding.make_mesh(jax.devices()), config) == expected
    assert sharding.of_members(seeds, sharding.make_mesh(jax.devices()[:1]), config) == ((None,) if seeds > 1 else ())


def test_a_member_with_a_device_of_its_own_is_the_run_alone():
    options = {"model_options__arr": True, "model_options__dropout": 0.1, "optimizer__name": "sgd"}
    run = build(tiny_config(**options), jax.devices()[:2], seeds=(0, 1))
    alone = build(tiny_config(seed=1, **options), jax.devices()[:1])
    # The batches go to their members; nothing else goes anywhere.
    assert set(count_collectives(run.lower().compile().as_text())) == {"all-to-all"}
    states, state = run.init(), alone.init()
    assert len(states.step.addressable_shards[0].data) == 1
    for step in range(5):  # the memories are updated in the last
        states, metrics = run.step(states, step)
        state, wanted = alone.step(state, step)
    mine = jax.tree.map(lambda leaf: np.asarray(leaf)[1], (states, metrics))
    chex.assert_trees_all_equal(mine, jax.device_get((state, wanted)))
    assert mine[0].model_state["forward_memory"]["blocks"]["mlp"]["activation"]["mean"].any()
    assert run.evaluate(states)[1][1]["eval_loss"] == pytest.approx(alone.evaluate(state)[1][0]["eval_loss"], abs=1e-5)
    assert len(run.figures(run.init())) == 2
