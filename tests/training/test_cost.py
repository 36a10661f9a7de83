"""What the compiler says that a training step costs."""

import importlib.util
import json

import jax
import pytest

from configs import cifar100_vit
from dpa_jax.training import cost
from dpa_jax.training.run import build
from tests.helpers import tiny_config
from tests.test_train import refused


@pytest.fixture(autouse=True)
def _quickly(compile_quickly):
    pass


def test_a_step_is_accounted_for_without_data(tmp_path):
    config = cifar100_vit.get_config()
    config.update(mechanism="relu", batch_size=64)
    config.model_options.update(embed_dim=12, depth=2, num_heads=3)
    config.data.dir = str(tmp_path / "nowhere")
    config.augment.update(crop="none", rand_augment="", erase=0.0)
    lines = cost.report(config, file=str(tmp_path / "cost.json")).splitlines()
    figures = json.loads((tmp_path / "cost.json").read_text())
    assert (figures["devices"], figures["device_kind"], figures["topology"]) == (8, "cpu", None)
    assert figures["argument_bytes"] + figures["temporary_bytes"] <= figures["peak_bytes"] < figures["memory_bytes"]
    assert figures["fits"] and figures["utilisation_ceiling"] is None
    assert figures["intensity"] == figures["flops"] / figures["bytes_accessed"]
    assert set(figures["collectives"]) == {"all-reduce"}  # the gradients and the loss of a sharded batch
    assert lines[2] == "a training step of 64, per device:"
    assert f"  collectives {figures['collectives']['all-reduce']} all-reduce" in lines


def test_blocks_in_a_loop_are_all_counted():
    def flops(depth):
        config = tiny_config(mechanism="relu", model_options__depth=depth, model_options__scan=True)
        return cost.compile_step(build(config, jax.devices()[:1])).flops

    assert flops(3) > 2 * flops(1)


def test_a_collective_that_is_split_counts_once():
    text = """
  %all-reduce.1 = f32[8] all-reduce(%a), channel_id=1, replica_groups={}
  %start.2 = f32[8] all-reduce-start(%b), channel_id=2, replica_groups={}
  %done.2 = f32[8] all-reduce-done(%start.2)
  %permute.3 = f32[8] collective-permute(%c), channel_id=3
  %permute.4 = f32[8] collective-permute(%d), channel_id=3, metadata={op_name="x"}
  ROOT %sum = f32[8] add(%all-reduce.1, %done.2)
"""
    assert cost.count_collectives(text) == {"all-reduce": 2, "collective-permute": 1}


def test_collectives_of_shard_map_are_counted_one_by_one():
    text = """
  %there.1 = f32[8] all-to-all(%a), channel_id=1, metadata={op_name="jit(f)/shard_map/all_to_all"}
  ROOT %back.2 = f32[8] all-to-all(%there.1), channel_id=1, metadata={op_name="jit(f)/shard_map/all_to_all"}
"""
    assert cost.count_collectives(text) == {"all-to-all": 2}


def test_the_ceiling_is_where_the_memory_stops_the_arithmetic():
    figures = dict.fromkeys(("peak_bytes", "argument_bytes", "temporary_bytes"), 2**30)
    figures |= {"devices": 4, "collectives": {}, "compile_seconds": 1.0, "memory_bytes": 2**30 - 1}
    # 197 TFLOP/s and 819 GB/s: half of 240.5 operations a byte is half of what the arithmetic could do.
    low, high = (
        cost.Cost(device_kind="TPU v5 lite", flops=flops, bytes_accessed=819e6, **figures) for flops in (98.5e9, 1e12)
    )
    assert low.utilisation_ceiling == pytest.approx(0.5)
    assert high.utilisation_ceiling == 1.0
    assert not low.fits


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology=v5e:2x2"], "--topology and --json are for --compile_only"),
        (["--json=cost.json"], "--topology and --json are for --compile_only"),
        (["--compile_only", "--eval"], "leave out --eval"),
        (["--compile_only", "--json=nowhere/cost.json"], "--json: there is no folder nowhere"),
        (["--compile_only", "--config.batch_size=12"], "batch_size must be a positive multiple of the 8 devices"),
    ],
    ids=["topology", "json", "eval", "folder", "batch"],
)
def test_what_is_refused(arguments, words):
    assert words in refused(*arguments)


def test_without_the_compiler_of_tpus_a_line_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^--topology needs TPUs' compiler: pip install 'dpa_jax\[tpu-aot\]'$"):
        cost.tpu_devices("v5e:2x2")


def test_a_step_is_compiled_for_tpus_that_are_not_here():
    pytest.importorskip("libtpu", reason="the extra tpu-aot is not installed")
    run = build(tiny_config(mechanism="dpa"), cost.tpu_devices("v5e:2x2"))
    found = cost.compile_step(run)
    assert (found.devices, found.device_kind, found.memory_bytes) == (4, "TPU v5 lite", 16 * 2**30)
    assert found.collectives["all-reduce"] >= 1 and found.fits
    assert 0 < found.utilisation_ceiling < 1
    assert "utilisation at most" in cost.table(run, found)
    with pytest.raises(ValueError, match=r"^--topology=v5e:3x7, .* is not divisible"):
        cost.tpu_devices("v5e:3x7")
