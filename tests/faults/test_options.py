"""Options that make no sense are refused with their key, and extreme ones that do are trained with."""

import re

import pytest

from tests.faults.harness import TINY

HUGE = "1" + 30 * "0"
WHOLE = {  # a key whose value is a whole number -> the least and the greatest that it may be
    "batch_size": (1, 2**31 - 1),
    "eval_batch_size": (1, 2**31 - 1),
    "epochs": (1, 2**31 - 1),
    "seed": (0, 2**32 - 1),
    "schedule.warmup_epochs": (0, 2**31 - 1),
    "schedule.step_epochs": (1, 2**31 - 1),
    "data.image_size": (1, 2**16),
    "data.channels": (1, 2**16),
    "data.num_classes": (1, 2**31 - 1),
    "data.train_examples": (1, 2**31 - 1),
    "data.test_examples": (1, 2**31 - 1),
    "data.workers": (0, 1024),
    "augment.image_size": (0, 2**16),
    "augment.padding": (0, 2**31 - 1),
    "augment.eval_resize": (0, 2**16),
    "checkpoint.keep": (1, 2**31 - 1),
    "checkpoint.every_steps": (0, 2**31 - 1),
    "eval_every_epochs": (1, 2**31 - 1),
    "model_options.depth": (1, 2**16),
    "model_options.patch_size": (1, 2**16),
    "model_options.embed_dim": (1, 2**16),
    "model_options.num_heads": (1, 2**16),
    "model_options.image_size": (1, 2**16),
    "mechanism_options.update_interval": (1, 2**31 - 1),
}
FLOATS = {  # a key whose value is a number -> values out of its range
    "label_smoothing": ("-0.1", "1.1"),
    "clip_norm": ("-1",),
    "optimizer.learning_rate": ("0", "-1"),
    "optimizer.weight_decay": ("-0.1",),
    "optimizer.beta1": ("1", "-0.1"),
    "optimizer.beta2": ("1", "-0.1"),
    "optimizer.eps": ("0", "1e-50"),
    "optimizer.momentum": ("1.1", "-0.1"),
    "schedule.warmup_learning_rate": ("-1",),
    "schedule.min_learning_rate": ("-1", "0.1"),
    "schedule.gamma": ("0", "-1"),
    "data.imbalance": ("0.5",),
    "augment.flip": ("-0.1", "1.1"),
    "augment.erase": ("-0.1", "1.1"),
    "augment.mixup": ("-1",),
    "augment.cutmix": ("-1",),
    "log_every_seconds": ("-1",),
    "model_options.dropout": ("-0.1", "1", "1.5", "0.99999999"),
    "model_options.stochastic_depth": ("-0.1", "1", "1.5", "0.99999999"),
    "model_options.mlp_ratio": ("0", "-1", "0.1", "1e9"),
    "mechanism_options.tau": ("-1",),
    "mechanism_options.momentum": ("-0.1", "1.1"),
    "coefficients.channel": ("-1",),
}
REFUSED = [(key, str(low - 1)) for key, (low, _) in WHOLE.items()]
REFUSED += [(key, str(high + 1)) for key, (_, high) in WHOLE.items()]
REFUSED += [(key, "2.5") for key in WHOLE]
REFUSED += [(key, value) for key, values in FLOATS.items() for value in values]
REFUSED += [(key, value) for key in FLOATS for value in ("nan", "-inf")]
REFUSED += [
    (key, value) for key in ("optimizer.learning_rate", "clip_norm", "coefficients.arr") for value in ("1e39", "inf")
]
REFUSED += [
    ("epochs", "True"),
    ("epochs", HUGE),
    ("seed", "None"),
    ("batch_size", "49"),  # more than the training set
    ("eval_batch_size", "1000000000"),
    ("epochs", "400000000"),  # more steps than are counted
    ("data.train_examples", "2000000000"),
    ("data.test_examples", "2000000000"),
    ("data.num_classes", "2000000000"),
    ("data.image_size", "60000"),
    ("data.mean", "('a',)"),
    ("data.mean", "(nan,)"),
    ("data.mean", "(127.5,)"),
    ("data.mean", "(0.5, 0.5)"),
    ("data.mean", "((0.5,),)"),
    ("data.std", "(0.0,)"),
    ("data.std", "(-1.0,)"),
    ("data.std", "(1e-30,)"),
    ("data.std", "(True,)"),
    ("data.std", "(0.5, 0.5, 0.5)"),
    ("data.name", "nowhere"),
    ("data.name", ""),
    ("data.resident", "disk"),
    ("data.corrupt", ""),
    ("schedule.milestones", "(3, 2)"),
    ("schedule.milestones", "(0, 2)"),
    ("schedule.milestones", "(1.5,)"),
    ("schedule.milestones", "('a', 'b')"),
    ("schedule.milestones", "(99999999999,)"),
    ("schedule.milestones", "((1, 2),)"),
    ("schedule.warmup_epochs", "3"),  # of 2
    ("augment.scale", "(0.5,)"),
    ("augment.scale", "(0.0, 1.0)"),
    ("augment.scale", "(0.9, 0.1)"),
    ("augment.scale", "(0.1, 1.1)"),
    ("augment.scale", "('a', 'b')"),
    ("augment.scale", "(1e-50, 1.0)"),
    ("augment.ratio", "(0.0, 1.0)"),
    ("augment.ratio", "(2.0, 1.0)"),
    ("augment.ratio", "(1.0, 1e400)"),
    ("augment.ratio", "()"),
    ("augment.color_jitter", "(0.1, 0.1, 0.1)"),
    ("augment.color_jitter", "(0.1, 0.1, 0.1, 0.6)"),
    ("augment.color_jitter", "(-0.1, 0.0, 0.0, 0.0)"),
    ("augment.color_jitter", "(1e30, 0.0, 0.0, 0.0)"),
    ("augment.color_jitter", "(0.0, 0.0, 0.0, 0.1)"),  # grey images have no hue
    ("augment.color_jitter", "(True, 0.0, 0.0, 0.0)"),
    ("augment.rand_augment", "nonsense"),
    ("augment.rand_augment", "rand-m9-q3"),
    ("augment.rand_augment", "rand-m1000000"),
    ("augment.rand_augment", "rand-n1000000000"),
    ("augment.rand_augment", "rand-n" + 400 * "9"),
    ("augment.rand_augment", "rand-mmax101"),
    ("augment.rand_augment", "rand-p1.5"),
    ("augment.rand_augment", "rand-inc2"),
    ("augment.rand_augment", "rand-m-1"),
    ("augment.rand_augment", "rand-mnan"),
    ("augment.rand_augment", "rand-m9-m9"),
    ("augment.interpolation", "nearest"),
    ("augment.crop", "half"),
    ("augment.eval_resize", "4"),  # less than the image
    ("precision", "float64"),
    ("optimizer.name", "lion"),
    ("schedule.name", "linear"),
    ("mechanism", "swosh"),
    ("model", "vgg"),
    ("mechanism_options.axis_name", "data"),
    ("mechanism_options.num_classes", "3"),
    ("mechanism_options.pool", "max"),
    ("mechanism_options.pool", "3"),
    ("mechanism_options.criterion", "xor"),
    ("mechanism_options.criterion", "3"),
    ("mechanism_options.tau", "high"),
    ("mechanism_options.tau", "True"),
    ("mechanism_options.name", "x"),
    ("model_options.depth", "True"),
    ("model_options.scan", "3"),
    ("model_options.scan", "maybe"),
    ("model_options.num_heads", "3"),  # does not divide the width
    ("model_options.patch_size", "3"),
    ("model_options.patch_size", "16"),
    ("model_options.arr", "3"),
    ("model_options.activation", "relu"),
    ("model_options.dtype", "float16"),
    ("model_options.in_channels", "3"),
    ("model_options.num_classes", "3"),
    ("model_options.stage_sizes", "(2, 2)"),
    ("coefficients.channel", "True"),
    ("coefficients.gate", "1e39"),
    ("allow_change", "epochs,nothing"),
]


@pytest.mark.parametrize(("key", "value"), REFUSED, ids=lambda text: text[:30])
def test_an_impossible_value_is_refused_with_its_key(case, key, value):
    # Neither the end of another key (batch_size of eval_batch_size) nor its beginning.
    case.refused(ended := case.train(*TINY, f"--config.{key}={value}"))
    assert re.search(rf"\b{key.split('.')[-1]}\b", ended.stderr), ended


TOGETHER = [
    (("mechanism=gdn", "mechanism_options.initial_gamma=-1"), "initial_gamma"),
    (("mechanism=elu", "mechanism_options.alpha=nan"), "alpha"),
    (("mechanism=elu", "mechanism_options.alpha=a"), "alpha"),
    (("mechanism=prelu", "mechanism_options.initial_slope=1e39"), "initial_slope"),
    (("mechanism=relu", "mechanism_options.alpha=1.0"), "alpha"),
    (("mechanism=dnrt", "mechanism_options.kind=matrix"), "kind"),
    (("mechanism=dnrt", "mechanism_options.base=swish"), "base"),
    (("mechanism=dnrt", "model_options.arr=False"), "arr"),
    (("mechanism=aiec", "mechanism_options.update_interval=0"), "update_interval"),
    (("mechanism=aiec", "mechanism_options.tau=-0.5"), "tau"),
    (("mechanism=aiec", "mechanism_options.momentum=0.5"), "momentum"),
    (("mechanism=aiec", "mechanism_options.axis_name=data"), "axis_name"),
    (("augment.crop=pad", "augment.padding=8"), "augment.padding"),
    (("augment.crop=pad", "augment.padding=1000000000"), "augment.padding"),
    (("augment.image_size=8", "augment.eval_resize=7"), "augment.eval_resize"),
    (("augment.image_size=16",), "image_size"),
    (("augment.image_size=60000",), "image_size"),
    (("augment.eval_resize=60000",), "eval_resize"),
    (("augment.mixup=1.0", "batch_size=1"), "augment.mixup"),
    (("augment.cutmix=1.0", "batch_size=1"), "augment.cutmix"),
    (("data.channels=2", "augment.rand_augment=rand-m9"), "augment.rand_augment"),
    (("data.channels=2", "augment.color_jitter=(0.5,0.5,0.5,0.0)"), "augment.color_jitter"),
    (("schedule.warmup_epochs=1", "schedule.warmup_learning_rate=1.0"), "schedule.warmup_learning_rate"),
    (("schedule.name=step", "schedule.step_epochs=1", "epochs=10000000"), "schedule.step_epochs"),
    (("schedule.name=step", "schedule.warmup_epochs=10000000", "epochs=10000000"), "schedule.warmup_epochs"),
    (("data.train_examples=1000", "data.imbalance=1e30", "batch_size=1000"), "batch_size"),
    (("model_options.embed_dim=65536", "model_options.depth=65536"), "model_options"),
    (("model_options.embed_dim=65535", "model_options.num_heads=2"), "num_heads"),
    (("optimizer.learning_rate=1e-9", "schedule.min_learning_rate=1e-8"), "min_learning_rate"),
]


@pytest.mark.parametrize(
    ("changes", "word"), TOGETHER, ids=lambda value: value if isinstance(value, str) else value[-1]
)
def test_values_that_do_not_go_together_are_refused(case, changes, word):
    case.refused(case.train(*TINY, *(f"--config.{change}" for change in changes)), word)


# A ResNet on the same images.
RESNET = [text for text in TINY if "model_options" not in text] + [
    "--config.model=resnet",
    "--config.model_options={'image_size': 8}",
]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("stage_sizes", "()"),
        ("stage_sizes", "(0,)"),
        ("stage_sizes", "(1.5,)"),
        ("stage_sizes", "('a',)"),
        ("stage_sizes", "(1000000000,)"),
        ("stage_sizes", "((1, 1),)"),
        ("stage_sizes", "abc"),
        ("stage_sizes", "3"),
        ("stage_sizes", "(" + 40 * "1, " + ")"),
        ("width", "0"),
        ("width", "-8"),
        ("width", "65537"),
        ("width", "1.5"),
        ("width", "True"),
        ("in_channels", "3"),
        ("patch_size", "2"),
    ],
)
def test_an_impossible_resnet_is_refused(case, option, value):
    options = f"{{'image_size': 8, '{option}': {value if value != 'abc' else repr(value)}}}"
    case.refused(case.train(*RESNET[:-1], f"--config.model_options={options}"), option)


COMPARED = [
    ("--seeds=0", "seeds"),
    ("--seeds=-1", "seeds"),
    ("--seeds=1000000000", "seeds"),
    ("--seeds=many", "seeds"),
    ("--seeds=", "seeds"),
    ("--vmap=-1", "vmap"),
    ("--vmap=some", "vmap"),
    ("--mechanisms=", "mechanisms"),
    ("--mechanisms=,", "mechanisms"),
    ("--mechanisms=relu,relu", "relu"),
    ("--mechanisms=relu+xyz", "relu+xyz"),
    ("--mechanisms=dpa:tau", "dpa:tau"),
    ("--mechanisms=dpa:tau=1:tau=2", "tau=2"),
    ("--mechanisms=dpa:tau=-1", "tau"),
    ("--mechanisms=dpa:tau=nan", "tau"),
    ("--mechanisms=dpa:momentum=2", "momentum"),
    ("--mechanisms=dpa:update_interval=0", "update_interval"),
    ("--mechanisms=dpa:update_interval=99999999999", "update_interval"),
    ("--mechanisms=dpa:axis_name=data", "axis_name"),
    ("--mechanisms=dpa:criterion=../../x", "criterion"),
    ("--mechanisms=dpa:tau={[]:1}", "tau"),
    ("--mechanisms=dpa:tau=" + "(" * 300, "tau"),
    ("--mechanisms=dqa", "dqa"),
    ("--mechanisms=../relu", "relu"),
    ("--config.seed=4294967296", "seed"),
    ("--config.seed=4294967295", "seed"),  # five seeds from there on
    ("--config.batch_size=0", "batch_size"),
    ("--config.epochs=0", "epochs"),
    ("--config.model_options.dropout=1", "dropout"),
    ("--config.mechanism_options.tau=0.5", "mechanism_options"),
    ("--workdir=", "workdir"),
]


@pytest.mark.parametrize(("argument", "word"), COMPARED, ids=lambda text: text[:40])
def test_an_impossible_comparison_is_refused(case, argument, word):
    case.refused(case.compare(*TINY, argument), word)


EXTREME = [
    ("seed=4294967295",),
    ("epochs=1", "batch_size=1", "eval_batch_size=1"),
    ("epochs=1", "batch_size=48", "eval_batch_size=256"),
    ("epochs=1", "clip_norm=-0.0", "augment.mixup=1e-30"),
    ("epochs=1", "augment.mixup=1e30", "augment.cutmix=1e30"),
    ("epochs=1", "model_options.dropout=0.999", "model_options.stochastic_depth=0.999"),
    ("epochs=1", "data.image_size=1", "model_options.image_size=1", "model_options.patch_size=1"),
    ("epochs=1", "data.num_classes=1"),
    ("epochs=1", "data.num_classes=2000"),
    ("epochs=1", "data.imbalance=1e30", "batch_size=4"),
    ("epochs=1", "augment.crop=pad", "augment.padding=7"),
    ("epochs=1", "augment.crop=resized", "augment.scale=(1e-30,1.0)", "augment.ratio=(1e-30,1e30)"),
    ("epochs=1", "augment.rand_augment=rand-m100-mstd101-n5-mmax100-p1-inc1", "augment.erase=1"),
    ("epochs=1", "augment.color_jitter=(100,100,100,0)"),
    ("epochs=1", "data.mean=(1.0,)", "data.std=(1e-6,)"),
    ("epochs=1", "label_smoothing=1.0"),
    ("epochs=1", "mechanism_options.tau=1e38", "mechanism_options.update_interval=2147483647"),
    ("epochs=1", "mechanism_options.momentum=1.0"),
    ("epochs=1", "optimizer.name=sgd", "optimizer.momentum=1.0"),
    ("epochs=1", "optimizer.beta1=0.9999999999999999", "optimizer.beta2=0.9999999999999999"),
    ("epochs=1", "schedule.name=multistep", "schedule.milestones=(2147483647,)"),
    ("schedule.name=step", "schedule.step_epochs=1", "schedule.warmup_epochs=1", "schedule.gamma=1"),
    ("epochs=1", "checkpoint.keep=2147483647", "checkpoint.every_steps=2147483647", "eval_every_epochs=2147483647"),
    ("epochs=1", "optimizer.learning_rate=1e-37", "optimizer.eps=1e37", "schedule.min_learning_rate=0"),
]


@pytest.mark.parametrize("changes", EXTREME, ids=" ".join)
def test_an_extreme_value_that_makes_sense_is_trained_with(case, changes):
    case.finished(case.train(*TINY, *(f"--config.{change}" for change in changes)))


@pytest.mark.parametrize("schedule", ["cosine", "step", "multistep", "constant"])
def test_a_run_of_ten_million_epochs_starts(case, schedule):
    program = case.start(
        "dpa_jax.train",
        f"--workdir={case.workdir}",
        *TINY,
        "--config.epochs=10000000",
        f"--config.schedule.name={schedule}",
    )
    assert program.wait_for(lambda: len(case.record()) > 1, timeout=60), str(program.wait(0))
    case.outcome = "graceful"


def test_the_last_seed_is_compared(case):
    case.finished(
        case.compare(*TINY, "--mechanisms=relu,dpa", "--seeds=2", "--config.seed=4294967294"),
        "4294967295" if 0 else "dpa",
    )
    assert case.record(case.workdir / "dpa" / "seed-4294967295")
