"""A whole run on images that are read from a folder at every step."""

import shutil

import numpy as np
import pytest
from PIL import Image

from configs import imagenet100_vit, imagenet_vit
from dpa_jax.config import default_config
from dpa_jax.data.feeds.stream import StreamFeed
from dpa_jax.data.images import CorruptImageError
from dpa_jax.training.loop import train_and_evaluate
from dpa_jax.training.run import build

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """24 images to train on and 10 to evaluate, of two classes that are easily told apart."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 5)):
        for label, name in enumerate(("dark", "light")):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = random.integers(12, 30, 2)
                image = random.integers(0, 120, (height, width, 3), np.uint8) + np.uint8(120 * label)
                Image.fromarray(image).save(tmp_path / "set" / split / name / f"{i}.jpg")
    return tmp_path / "set"


@pytest.fixture
def config(folder):
    """3 steps an epoch."""
    config = default_config()
    config.update(mechanism="relu", batch_size=8, eval_batch_size=8, epochs=2)
    config.schedule.name = "constant"
    config.model_options = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1}
    config.data.update(name="imagenet", dir=str(folder))
    config.augment.update(image_size=8, crop="resized", scale=(0.5, 1.0), flip=0.5, eval_resize=10)
    config.optimizer.learning_rate = 0.02
    return config


def test_a_run_on_a_folder_goes_on_as_if_never_interrupted(config, tmp_path, capsys):
    last = train_and_evaluate(config, tmp_path / "run")
    assert (last["step"], last["eval_top1"] * 10 % 1) == (6, 0)  # of 10 images, not of the 16 in the padded batches
    shutil.rmtree(tmp_path / "run/checkpoints/6")
    again = train_and_evaluate(config, tmp_path / "run")
    times = {"images_per_second": 0, "seconds": 0}
    assert again | times == last | times
    assert f"continuing after step 3 of 6 in {tmp_path / 'run'}" in capsys.readouterr().err


def test_a_corrupt_image_stops_a_run_with_its_path(config, tmp_path):
    (tmp_path / "set/train/dark/3.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(CorruptImageError, match=r"train/dark/3\.jpg cannot be decoded"):
        train_and_evaluate(config, tmp_path / "run")


def test_a_model_of_another_size_is_refused(config):
    assert isinstance(build(config).feeds[0], StreamFeed)
    config.augment.update(image_size=12, eval_resize=0)
    with pytest.raises(ValueError, match=r"takes inputs of shape \(8, 8, 3\); .* come as \(12, 12, 3\)"):
        build(config)


def test_a_dry_run_of_the_imagenet_configurations(folder, tmp_path):
    config, config100 = imagenet_vit.get_config(), imagenet100_vit.get_config()
    config100.data.name = "imagenet"
    assert config100.to_dict() == config.to_dict()
    config.update(batch_size=8, eval_batch_size=8, epochs=1)
    config.data.update(dir=str(folder), workers=0)
    config.schedule.update(warmup_epochs=0, min_learning_rate=0.0)
    config.model_options.update(embed_dim=48, depth=2, num_heads=3)
    last = train_and_evaluate(config, tmp_path / "run")
    assert last["step"] == 3 and last["eval_top1"] * 10 % 1 == 0
    assert {"loss_channel", "masked_fraction"} <= last.keys()
    (feed,) = build(config).feeds
    assert feed.train(0).inputs.shape == (8, 224, 224, 3)
    assert isinstance(feed, StreamFeed)
