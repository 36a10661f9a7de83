import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from dpa_jax.config import default_config
from dpa_jax.data.batch import ArraySpec, Batch, Spec
from dpa_jax.data.feeds import base, make_feed
from dpa_jax.data.feeds.memory import MemoryFeed
from dpa_jax.data.feeds.sampler import Sampler
from dpa_jax.data.images import image_spec
from dpa_jax.data.sources import Source
from dpa_jax.data.splits import ArraySplit


def make_split(examples=21) -> ArraySplit:
    random = np.random.default_rng(3)
    images = random.integers(0, 256, (examples, 4, 5, 3), np.uint8)
    return ArraySplit(images, random.integers(0, 7, examples).astype(np.int32))


def make_source(split: ArraySplit, spec: Spec | None = None, reads: list | None = None) -> Source:
    """A source whose two splits are this one."""

    def read():
        if reads is not None:
            reads.append("read")
        return split, split

    names = tuple("abcdefg")
    spec = spec or image_spec("set", (4, 5, 3), names, len(split), len(split))
    return Source(spec, read, lambda: np.bincount(split.labels, minlength=7))


def feed_of(source, mesh, batch_size, seed=0, resident="auto", split="train"):
    config = default_config()
    config.seed, config.data.resident = seed, resident
    return make_feed(source, mesh, batch_size, config, split)


def make_mesh(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("data",))


def as_numpy(batch: Batch) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in (batch.inputs, batch.labels, batch.index, batch.epoch)]


@pytest.mark.parametrize("batch_size", [1, 4, 8, 21])
def test_every_image_comes_once_an_epoch_and_every_batch_is_full(batch_size):
    sampler = Sampler(21, batch_size, seed=5)
    batches = [sampler.indices(step) for step in range(sampler.steps(4) + 1)]
    assert all(index.shape == epoch.shape == (batch_size,) for index, epoch in batches)
    index = np.concatenate([index for index, _ in batches])
    epoch = np.concatenate([epoch for _, epoch in batches])
    assert np.array_equal(epoch, np.arange(len(epoch)) // 21)
    for e in range(4):
        assert sorted(index[epoch == e]) == list(range(21))
    assert index.dtype == epoch.dtype == np.int32


def test_epochs_and_seeds_have_their_own_order():
    def order(seed, epoch):
        return tuple(Sampler(50, 50, seed).indices(epoch)[0])

    orders = {order(seed, epoch) for seed in (0, 1, 2**32 - 1) for epoch in range(4)}
    assert len(orders) == 12 and tuple(range(50)) not in orders


def test_a_step_needs_no_steps_before_it():
    through = Sampler(21, 8, seed=1)
    passed = [through.indices(step) for step in range(40)]
    for step in (39, 0, 17):
        for one, other in zip(Sampler(21, 8, seed=1).indices(step), passed[step], strict=True):
            assert np.array_equal(one, other)


def test_the_order_is_for_ever():
    """A resumed run must meet the order it was begun with: other numbers here would break that."""
    assert Sampler(10, 10, seed=0).indices(0)[0].tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert Sampler(10, 10, seed=7).indices(3)[0].tolist() == [2, 5, 9, 7, 3, 0, 6, 8, 4, 1]


def test_steps_of_epochs_add_up():
    sampler = Sampler(1437, 64, seed=0)
    assert [sampler.steps(epochs) for epochs in (0, 1, 2, 40)] == [0, 22, 45, 898]


@pytest.mark.parametrize("batch_size", [0, 22])
def test_a_batch_that_cannot_be_filled_is_refused(batch_size):
    with pytest.raises(ValueError, match=rf"between 1 and the 21 examples of the split, not {batch_size}"):
        Sampler(21, batch_size, seed=0)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed must not be negative"):
        Sampler(21, 2, seed=-1)


@pytest.mark.parametrize("resident", ["device", "host"])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_batches_are_the_splits_rows_on_any_devices(devices, resident):
    split, mesh = make_split(), make_mesh(devices)
    feed = feed_of(make_source(split), mesh, batch_size=8, seed=2, resident=resident)
    for step in range(6):  # over two epoch boundaries
        with jax.transfer_guard("disallow"):
            batch = feed.train(step)
        index, epoch = Sampler(21, 8, seed=2).indices(step)
        expected = [split.inputs[index], split.labels[index], index, epoch]
        for leaf, array in zip(as_numpy(batch), expected, strict=True):
            assert leaf.dtype == array.dtype and np.array_equal(leaf, array)
        for leaf in jax.tree.leaves(batch):
            assert len(leaf.sharding.device_set) == devices
            assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {8 // devices}


@pytest.mark.parametrize("resident", ["device", "host"])
def test_evaluation_sees_the_whole_split_in_order_and_pads_the_end(resident):
    split = make_split(21)
    feed = feed_of(make_source(split), make_mesh(8), batch_size=8, resident=resident, split="eval")
    feed.load()
    with jax.transfer_guard("disallow"):
        batches = list(feed.evaluation())
    images, labels, index, epoch = (np.concatenate(leaves) for leaves in zip(*map(as_numpy, batches), strict=True))
    assert len(batches) == 3 and not epoch.any()
    assert np.array_equal(images[:21], split.inputs) and np.array_equal(labels[:21], split.labels)
    assert labels[21:].tolist() == [-1] * 3 and index.tolist() == [*range(21), 0, 0, 0]
    assert np.array_equal(images[21:], split.inputs[[0, 0, 0]])


def test_a_split_smaller_than_the_batch_can_be_evaluated():
    (batch,) = feed_of(make_source(make_split(3)), make_mesh(8), batch_size=8, split="eval").evaluation()
    assert (np.asarray(batch.labels) >= 0).sum() == 3


def test_images_that_do_not_fit_stay_on_the_host(monkeypatch):
    split = make_split()
    monkeypatch.setattr(base, "_CPU_BYTES", 2 * split.inputs.nbytes)
    assert feed_of(make_source(split), make_mesh(2), 2).resident == "device"
    assert feed_of(make_source(split), make_mesh(4), 4).resident == "host"  # four copies in the same memory


class Accelerator:
    platform = "gpu"

    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        if self.stats == "not here":
            raise jax.errors.JaxRuntimeError("MemoryStats is only supported for addressable PjRt devices.")
        return self.stats


@pytest.mark.parametrize(
    ("stats", "fits"), [({"bytes_limit": 400}, True), ({"bytes_limit": 399}, False), (None, False), ("not here", False)]
)
def test_an_accelerator_holds_what_takes_a_quarter_of_its_memory(stats, fits):
    class Machines:
        local_devices = (Accelerator(stats),)

    assert base.fits(100, Machines()) is fits


@pytest.mark.parametrize("batch_size", [0, 4, 12])
def test_a_batch_that_does_not_divide_is_refused(batch_size):
    with pytest.raises(ValueError, match=rf"positive multiple of the 8 devices, not {batch_size}"):
        feed_of(make_source(make_split()), make_mesh(8), batch_size)


# ---------------- Nothing before it is needed ----------------


@pytest.mark.parametrize("resident", ["device", "host"])
def test_a_source_is_read_once_and_not_before_it_is_needed(resident):
    reads = []
    source = make_source(make_split(), reads=reads)
    feed = feed_of(source, make_mesh(2), 4, resident=resident)
    others = [feed.reordered(seed) for seed in (1, 2)]
    evaluation = feed_of(source, make_mesh(2), 4, resident=resident, split="eval")
    assert feed.abstract_batch.inputs.shape == (4, 4, 5, 3) and feed.sampler.steps(2) == 10 and not reads
    feed.load()
    for other in (feed, *others):
        index, _ = Sampler(21, 4, seed=other.seed).indices(3)
        assert np.array_equal(other.train(3).index, index) and other._stored()[1] is feed._stored()[1]
    assert len(list(evaluation.evaluation())) == 6 and reads == ["read"]


def test_a_feed_can_be_made_for_devices_that_are_not_here(monkeypatch):
    mesh = Mesh(np.array(jax.devices()[::-1]), ("data",))
    reads = []
    monkeypatch.setattr(Mesh, "local_devices", [Accelerator("not here")])  # those of a topology that is compiled for
    feed = feed_of(make_source(make_split(), reads=reads), mesh, 16)
    assert isinstance(feed, MemoryFeed) and feed.resident == "host"
    for leaf, array in zip(feed.abstract_batch, feed_of(make_source(make_split()), mesh, 16).train(0), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (array.shape, array.dtype, array.sharding)
    assert not reads


# ---------------- Inputs that are no images ----------------


@pytest.mark.parametrize("resident", ["device", "host"])
def test_inputs_may_be_any_pytree(resident):
    random = np.random.default_rng(0)
    inputs = {"tokens": random.integers(0, 99, (21, 6), np.int32), "length": random.uniform(size=21)}
    inputs["length"] = inputs["length"].astype(np.float32)
    split = ArraySplit(inputs, make_split().labels)
    shapes = {"tokens": ArraySpec((6,), np.dtype(np.int32)), "length": ArraySpec((), np.dtype(np.float32))}
    source = make_source(split, Spec("words", shapes, 7, tuple("abcdefg"), 21, 21))
    feed = feed_of(source, make_mesh(4), 8, seed=3, resident=resident)
    for step in (0, 2):
        with jax.transfer_guard("disallow"):
            batch = feed.train(step)
        index, _ = Sampler(21, 8, seed=3).indices(step)
        assert np.array_equal(batch.labels, split.labels[index])
        for name, array in inputs.items():
            leaf, abstract = batch.inputs[name], feed.abstract_batch.inputs[name]
            assert np.array_equal(leaf, array[index])
            assert (leaf.shape, leaf.dtype, leaf.sharding) == (abstract.shape, abstract.dtype, abstract.sharding)
    *_, last = feed_of(source, make_mesh(4), 8, resident=resident, split="eval").evaluation()
    assert np.array_equal(last.inputs["tokens"], inputs["tokens"][[16, 17, 18, 19, 20, 0, 0, 0]])
    assert np.array_equal(last.labels, [*split.labels[16:], -1, -1, -1])
    transforms = source.spec.transforms(default_config(), feed, feed)
    assert transforms.train(jax.random.key(0), batch) is batch.inputs is transforms.evaluate(batch)
    assert transforms.mix is None
