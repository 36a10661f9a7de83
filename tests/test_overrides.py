"""What follows from a key that the command line changes."""

import pathlib

import jax
import pytest

from dpa_jax import command_line, models
from dpa_jax.config import default_config, validate
from dpa_jax.overrides import PAPERS, follow_epochs
from dpa_jax.training.state import create_model

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def parsed(file, *arguments):
    """The configuration of a command line, and what it says of it."""
    options = command_line.parse(lambda options: None, ["train.py", f"--config={CONFIGS / file}", *arguments])
    return options.config, "\n".join(options.notes)


@pytest.mark.parametrize("name", PAPERS)
def test_one_file_a_data_set_takes_every_model_of_the_papers(name):
    files = {"cifar100_vit.py": (32, 5.0), "cifar10_vit.py": (32, 1.0), "imagenet_vit.py": (224, 5.0)}
    for file, (size, weight) in files.items():
        config, _ = parsed(file, f"--config.model={name}")
        validate(config)
        model = create_model(config, 10, in_channels=3)
        assert (model.image_size, config.precision) == (size, "bfloat16")
        assert getattr(model, "stochastic_depth", 0.0) == (0.1 if PAPERS[name].stochastic_depth else 0.0)
        assert config.coefficients.channel == (weight if PAPERS[name].channel is None else 1.0)


def test_what_is_given_stays():
    given = ["--config.model_options.stochastic_depth=0.2", "--config.coefficients.channel=3.0"]
    config, note = parsed("cifar100_vit.py", *given, "--config.model=pvt_tiny")
    assert dict(config.model_options) == {"stochastic_depth": 0.2} and config.coefficients.channel == 3.0
    assert note == "note: model is pvt_tiny_patch2_32"


def test_sizes_of_another_model_do_not_stay():
    config, note = parsed("digits_vit.py", "--config.model=resnet18", "--config.epochs=10")
    assert dict(config.model_options) == {"image_size": 8}
    assert "note: model is resnet18, without model_options.depth, without model_options.embed_dim" in note
    assert "note: epochs changed from 100 to 10, and in proportion schedule.warmup_epochs from 5 to 0" in note
    model = create_model(config, 10, in_channels=1)
    assert jax.eval_shape(model.init, jax.random.key(0), model.example_inputs)["params"]


def test_other_models_are_left_alone():
    config, note = parsed("digits_vit.py", "--config.model=vit")
    assert config.model_options.depth == 4 and note == ""
    assert {name for paper in PAPERS.values() for name in paper[:2]} <= models.MODELS.keys()


FOLLOWED = [
    ({"warmup_epochs": 5}, {"epochs": 12}, {"warmup_epochs": 1}, "schedule.warmup_epochs from 5 to 1"),
    ({"warmup_epochs": 5}, {"epochs": 200}, {"warmup_epochs": 10}, "schedule.warmup_epochs from 5 to 10"),
    ({"warmup_epochs": 5}, {"epochs": 1}, {"warmup_epochs": 0}, "schedule.warmup_epochs from 5 to 0"),
    ({"warmup_epochs": 45}, {"epochs": 4}, {"warmup_epochs": 1}, "schedule.warmup_epochs from 45 to 1"),
    ({"warmup_epochs": 5}, {"epochs": 100}, {"warmup_epochs": 5}, ""),
    ({"warmup_epochs": 5}, {"epochs": 12, "schedule.warmup_epochs": 5}, {"warmup_epochs": 5}, ""),
    ({"warmup_epochs": 0, "step_epochs": 30}, {"epochs": 12}, {"step_epochs": 30}, ""),  # the cosine has no steps
    (
        {"name": "step", "warmup_epochs": 10, "step_epochs": 30},
        {"epochs": 10},
        {"warmup_epochs": 1, "step_epochs": 3},
        "schedule.warmup_epochs from 10 to 1, schedule.step_epochs from 30 to 3",
    ),
    ({"step_epochs": 30}, {"epochs": 2, "schedule.name": "step"}, {"step_epochs": 1}, "step_epochs from 30 to 1"),
    (
        {"name": "multistep", "milestones": (50, 51, 75)},
        {"epochs": 10},
        {"milestones": (5, 8)},
        "schedule.milestones from (50, 51, 75) to (5, 8)",
    ),
    ({"warmup_epochs": 60}, {"epochs": 200}, {"warmup_epochs": 60}, ""),  # does not fit by itself
    ({"warmup_epochs": 5}, {"epochs": 0}, {"warmup_epochs": 5}, ""),  # for `validate` to refuse
]


@pytest.mark.parametrize(("file", "given", "then", "note"), FOLLOWED)
def test_the_schedule_follows_epochs(file, given, then, note):
    before = default_config()
    before.epochs = 100
    before.schedule.update(file)
    config = before.copy_and_resolve_references()
    config.update_from_flattened_dict(given)
    told = follow_epochs(config, before, given)
    assert note in told and told.startswith("note: epochs changed from 100 to ") == bool(note)
    assert {name: config.schedule[name] for name in then} == then
    if given["epochs"]:
        validate(config)


def test_what_follows_epochs_by_itself_follows_once():
    before = default_config()
    before.schedule.warmup_epochs = before.get_ref("epochs") // 15
    config = before.copy_and_resolve_references()
    config.update(epochs=30, schedule={"warmup_epochs": 2})  # as a reference is
    assert follow_epochs(config, before, {"epochs": 30}) == "" and config.schedule.warmup_epochs == 2
