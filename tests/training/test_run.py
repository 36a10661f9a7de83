"""A run before there is data, and what its members share."""

import jax
import pytest

from configs import cifar100_vit
from dpa_jax.training.loop import train_and_evaluate
from dpa_jax.training.run import build
from tests.helpers import tiny_config

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture
def config(tmp_path):
    """The recipe for CIFAR-100 with a small model, where there is no data."""
    config = cifar100_vit.get_config()
    config.model_options.update(embed_dim=12, depth=2, num_heads=3)
    config.data.dir = str(tmp_path / "nowhere")
    return config


def test_the_step_is_built_and_compiled_before_there_is_data(config):
    run = build(config)
    compiled = run.lower().compile()
    assert run.abstract_batch[0].inputs.shape == (256, 32, 32, 3)
    assert run.total_steps == 58594
    (state, batches), _ = compiled.input_shardings
    assert len(batches[0].inputs.device_set) == 8 and state.params["head"]["bias"].is_fully_replicated
    with pytest.raises(FileNotFoundError, match=r"train\.py --config configs/cifar100_vit\.py .*data\.download=True"):
        run.load()


def test_missing_data_is_told_before_anything_is_compiled_or_written(config, tmp_path, caplog):
    with jax.log_compiles():
        with pytest.raises(FileNotFoundError, match=str(tmp_path / "nowhere")):
            train_and_evaluate(config, tmp_path / "run")
        assert "Compiling" not in caplog.text
        jax.jit(lambda x: x + 1)(1)
        assert "Compiling" in caplog.text  # it would have been seen
    assert not (tmp_path / "run").exists()


def test_groups_of_one_size_share_what_is_compiled():
    run = build(tiny_config(mechanism="relu", model_options__patch_size=8), jax.devices()[:1])
    first, second = run.with_seeds((0, 1)), run.with_seeds((2, 3))
    for group in (first, second):
        group.step(group.init(), 0)
    assert first._compiled is second._compiled and first._compiled.step._cache_size() == 1
    run.step(run.init(), 0)
    assert run._compiled.step._cache_size() == 1


@pytest.mark.parametrize("first", [True, False], ids=["scanned first", "unrolled first"])
def test_a_run_goes_on_in_the_other_form_of_its_blocks(first, tmp_path):
    """Checkpoints of scanned and of unrolled blocks are the same, so one form continues the other."""

    def config(scan, epochs):
        options = {"model_options__depth": 2, "model_options__scan": scan, "model_options__stochastic_depth": 0.2}
        return tiny_config(
            epochs=epochs, allow_change="model_options.scan,epochs", schedule__name="constant", **options
        )

    alone = train_and_evaluate(config(first, 2), tmp_path / "alone")
    train_and_evaluate(config(first, 1), tmp_path / "both")
    both = train_and_evaluate(config(not first, 2), tmp_path / "both")
    for name in ("train_loss", "eval_loss", "loss_channel", "gradient_norm"):
        assert both[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name
    assert alone["masked_fraction"] > 0
