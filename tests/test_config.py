import importlib.util
import pathlib

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from dpa_jax.config import default_config, each_key, validate

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def changed(path, value):
    """The defaults as a plain dict, which takes anything, with one key set."""
    config = default_config().to_dict()
    *groups, key = path.split(".")
    group = config
    for name in groups:
        group = group[name]
    group[key] = value
    return config


def parse(*overrides, path=CONFIGS[0]):
    values = flags.FlagValues()
    argv = ["train.py", f"--config={path}", *(f"--config.{override}" for override in overrides)]
    holder = config_flags.DEFINE_config_file(
        "config", flag_values=values, lock_config=False, accept_new_attributes=True, sys_argv=argv
    )
    values(argv)
    return holder.value


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_file_is_valid(path):
    validate(load(path))


def test_the_papers_recipe():
    config = load(next(path for path in CONFIGS if path.stem == "cifar100_vit"))
    assert (config.epochs, config.batch_size, config.clip_norm) == (300, 256, 1.0)
    assert config.optimizer.learning_rate == pytest.approx(0.0005 * 256 / 512)
    assert config.coefficients.to_dict() == {"channel": 5.0, "arr": 20.0, "aux": 1.0, "gate": 200.0}
    config.batch_size = 1024
    assert config.optimizer.learning_rate == pytest.approx(0.0005 * 1024 / 512)
    config10 = load(next(path for path in CONFIGS if path.stem == "cifar10_vit"))
    assert (config10.data.name, config10.coefficients.channel, config10.coefficients.arr) == ("cifar10", 1.0, 10.0)
    imagenets = [
        load(next(path for path in CONFIGS if path.stem == f"{name}_vit")) for name in ("imagenet", "imagenet100")
    ]
    for one in (config, config10, *imagenets):
        recipe = one.augment
        assert (recipe.crop, recipe.scale, recipe.ratio, recipe.interpolation) == (
            "resized",
            (0.08, 1),
            (3 / 4, 4 / 3),
            "random",
        )
        assert (recipe.flip, recipe.rand_augment, recipe.erase) == (0.5, "rand-m9-mstd0.5-inc1", 0.25)
        assert (recipe.mixup, recipe.cutmix, any(recipe.color_jitter), one.label_smoothing) == (0, 0, False, 0)
        assert (recipe.image_size, recipe.eval_resize) == ((224, 256) if one in imagenets else (32, 36))


def test_a_typo_in_a_configuration_file_raises_with_the_nearest_key():
    config = default_config()
    with pytest.raises(AttributeError, match='"batch_size" instead of "batch_sise"'):
        config.batch_sise = 3
    with pytest.raises(AttributeError, match='"learning_rate" instead of "learning_rat"'):
        config.optimizer.learning_rat = 0.1
    with pytest.raises(TypeError, match=r"'epochs'.*float.*int"):
        config.epochs = 2.5
    assert config.to_dict() == default_config().to_dict()


def test_command_line():
    config = parse(
        "batch_size=32",
        "optimizer.learning_rate=1",
        "schedule.milestones=(3, 7)",
        "data.download=True",
        "coefficients.arr=2.5",
        "mechanism_options.tau=0.25",
        "model_options.depth=2",
    )
    validate(config)
    assert (config.batch_size, config.optimizer.learning_rate, config.data.download) == (32, 1.0, True)
    assert config.schedule.milestones == (3, 7)
    assert config.mechanism_options.to_dict() == {"tau": 0.25}
    assert config.coefficients.arr == 2.5
    assert config.model_options.depth == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_sise=3", '"batch_size" instead of "batch_sise"'),
        ("optimizer.learning_rte=3", '"learning_rate" instead of "learning_rte"'),
        ("batch_size=3.5", "config.batch_size=3.5: invalid literal for int"),
        ("data.download=perhaps", "config.data.download=perhaps"),
    ],
)
def test_command_line_refuses(override, message):
    with pytest.raises((KeyError, AttributeError, flags.Error)) as error:
        parse(override)
    assert message in str(error.value).replace("\\", "")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("batch_sise", 3, r"no key batch_sise\. Did you mean batch_size\?"),
        ("learning_rate", 0.1, r"no key learning_rate\. Did you mean optimizer\.learning_rate\?"),
        ("optimizer.learning_rte", 0.1, r"no key optimizer\.learning_rte\. .*optimizer\.learning_rate\?"),
        ("optimizer.zzz", 0.1, r"no key optimizer\.zzz\. The keys there are beta1, beta2"),
        ("batch_size", 3.5, r"batch_size must be of type int; got 3\.5 of type float"),
        ("batch_size", True, "batch_size must be of type int; got True of type bool"),
        ("epochs", None, "epochs must be of type int; got None"),
        ("optimizer.eps", "small", "optimizer.eps must be a finite float; got 'small' of type str"),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate must be a finite float; got nan"),
        ("data", "digits", "data must be a group of keys; got 'digits' of type str"),
        ("batch_size", 0, "batch_size must be at least 1; got 0"),
        ("epochs", -1, "epochs must be at least 1; got -1"),
        ("seed", -1, r"seed must be in \[0, 4294967295\]; got -1"),
        ("label_smoothing", 1.5, r"label_smoothing must be in \[0.0, 1.0\]; got 1.5"),
        ("coefficients.channel", "5", r"coefficients\.channel must be a number; got '5'"),
        ("coefficients.chanel", 5.0, r"must be one of channel, arr, .*'chanel'\. Did you mean 'channel'\?"),
        ("precision", "bf16", "precision must be one of float32, bfloat16; got 'bf16'.*'bfloat16'"),
        ("optimizer.name", "sgdd", r"optimizer\.name must be one of .*'sgdd'\. Did you mean 'sgd'\?"),
        ("optimizer.learning_rate", 0.0, r"optimizer\.learning_rate must be more than 0; got 0"),
        ("optimizer.momentum", 1.1, r"optimizer\.momentum must be in \[0\.0, 1\.0\]; got 1\.1"),
        ("optimizer.beta2", 1.0, r"optimizer\.beta2 must be in \[0, 1\); got 1\.0"),
        ("schedule.name", "cosin", r"schedule\.name must be one of .*Did you mean 'cosine'\?"),
        (
            "schedule.warmup_epochs",
            150,
            r"schedule\.warmup_epochs must be less than half of .*got 150 of 300.* 0 to 149$",
        ),
        ("schedule.milestones", (5, 3), r"schedule\.milestones must be whole numbers of epochs, rising"),
        ("schedule.milestones", (0.5,), r"schedule\.milestones must be whole numbers of epochs, rising"),
        ("schedule.min_learning_rate", 0.1, r"schedule\.min_learning_rate must be in \[0\.0, 0\.001\]"),
        ("data.num_classes", 0, r"data\.num_classes must be at least 1; got 0"),
        ("data.resident", "gpu", r"data\.resident must be one of auto, device, host"),
        ("augment.crop", "padd", r"augment\.crop must be one of .*Did you mean 'pad'\?"),
        ("augment.scale", (0.5, 2.0), r"augment\.scale must be \(low, high\), more than 0, at most 1\.0"),
        ("augment.ratio", (2.0, 0.5), r"augment\.ratio must be \(low, high\)"),
        ("data.corrupt", "ignore", r"data\.corrupt must be one of refuse, replace"),
        ("data.imbalance", 0.5, r"data\.imbalance must be at least 1\.0; got 0\.5"),
        ("allow_change", "epochs,batch_sise", r"allow_change: there is no key batch_sise\. Did you mean batch_size\?"),
        ("augment.color_jitter", (0.4, 0.4, 0.4), r"augment\.color_jitter must be 4 numbers"),
        ("augment.color_jitter", (0.4, 0.4, 0.4, 0.6), r"the last at most 0\.5"),
        ("augment.erase", 1.5, r"augment\.erase must be in \[0\.0, 1\.0\]"),
        ("augment.mixup", -1.0, r"augment\.mixup must be at least 0"),
        ("augment.flip", -0.5, r"augment\.flip must be in \[0\.0, 1\.0\]; got -0\.5"),
        ("checkpoint.keep", 0, r"checkpoint\.keep must be at least 1; got 0"),
        ("epochs", 2**31, r"epochs must be at most 2147483647; got 2147483648"),
        ("eval_batch_size", 10**400, r"eval_batch_size must be at most 2147483647"),
        ("optimizer.learning_rate", 10**400, r"optimizer\.learning_rate must be a finite float"),
        ("optimizer.learning_rate", 1e300, r"must be a finite float; got 1e\+300 of type float; float32 has 0 and"),
        ("optimizer.eps", 1e-50, r"optimizer\.eps must be a finite float; got 1e-50"),
        ("coefficients.channel", -1.0, r"coefficients\.channel must be at least 0"),
        ("coefficients.channel", 1e39, r"coefficients\.channel must be a number; got 1e\+39"),
        ("data.image_size", 10**6, r"data\.image_size must be at most 65536"),
        ("data.workers", 10**6, r"data\.workers must be at most 1024"),
        ("data.mean", ("a",), r"data\.mean must be numbers in \[0, 1\], one a channel; got \('a',\)"),
        ("data.mean", (127.5,), r"data\.mean must be numbers in \[0, 1\]"),
        ("data.std", (0.0,), r"data\.std must be numbers from 1e-6, one a channel; got \(0\.0,\)"),
        ("augment.color_jitter", (1e30, 0, 0, 0), r"augment\.color_jitter must be 4 numbers"),
        ("mechanism_options", {"tau": {1: 2}}, r"the keys of mechanism_options\.tau must be text"),
        ("data", {3: 4}, r"the keys of data must be text"),
    ],
)
def test_validate_refuses(path, value, message):
    with pytest.raises(ValueError, match=message):
        validate(changed(path, value))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"augment": {"eval_resize": 7, "image_size": 8}},
            r"augment\.eval_resize must be 0 or at least .*, 8, .* got 7",
        ),
        (
            {"augment": {"cutmix": 1.0}, "batch_size": 1},
            r"augment\.cutmix mixes pairs of images; got 1\.0 with batch_size 1",
        ),
        ({"schedule": {"warmup_epochs": 1, "warmup_learning_rate": 1.0}}, r"schedule\.warmup_learning_rate must be in"),
        # From its highest rate the cosine would drop to its lowest in one step.
        ({"epochs": 6, "schedule": {"warmup_epochs": 3}}, r"less than half of epochs.*got 3 of 6, .* may be 0 to 2$"),
        (
            {"epochs": 6, "schedule": {"name": "step", "warmup_epochs": 6}},
            r"must be less than epochs.*got 6 of 6, .* may be 0 to 5$",
        ),
    ],
)
def test_validate_refuses_what_does_not_go_together(changes, message):
    config = default_config()
    config.update(changes)
    with pytest.raises(ValueError, match=message):
        validate(config)


@pytest.mark.parametrize("config", [3, None, [], {3: 4}, {"a": {"a": {}}}, ConfigDict({"": 0, 0: 0})], ids=range(6))
def test_what_is_no_configuration_is_refused(config):
    with pytest.raises(ValueError, match="config: "):
        validate(config)


def test_validate_names_a_missing_key():
    config = default_config().to_dict()
    del config["optimizer"]["beta1"]
    with pytest.raises(ValueError, match=r"the key optimizer\.beta1 is missing"):
        validate(config)


def test_every_key_says_what_it_means():
    values = default_config().to_dict()
    for path, key in each_key():
        assert key.about.endswith("."), path
        *group, name = path.split(".")
        assert (values[group[0]] if group else values).pop(name) == key.default
    assert all(value == {} for value in values.values())  # there was nothing else


# What a file has, and what is given with new epochs; what the schedule has then, and the note.
