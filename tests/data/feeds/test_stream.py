import collections
import hashlib
import multiprocessing
import os
import pathlib
import pickle
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures.process import BrokenProcessPool

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image

from dpa_jax.config import default_config
from dpa_jax.data import augment
from dpa_jax.data.feeds import base, make_feed
from dpa_jax.data.feeds.examples import uniform
from dpa_jax.data.feeds.host_crop import DRAWS, EvalCrop, TrainCrop
from dpa_jax.data.feeds.memory import MemoryFeed
from dpa_jax.data.feeds.sampler import Sampler
from dpa_jax.data.feeds.stream import StreamFeed
from dpa_jax.data.images import CorruptImageError
from dpa_jax.data.sources import open_source
from dpa_jax.data.splits import ArraySplit

EXAMPLES = 21  # 12 and 9 of two classes; 8 and 6 to evaluate


def make_tree(root, sizes=((19, 14), (11, 23), (16, 16))):
    random = np.random.default_rng(0)
    for split, counts in (("train", (12, 9)), ("val", (8, 6))):
        for name, count in zip(("ant", "bee"), counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = sizes[i % len(sizes)]
                coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8))
                coarse.resize((width, height)).save(root / split / name / f"{i:02}.png")
    return root


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return make_tree(tmp_path / "set")


def damage(root, *paths):
    for path in paths:
        content = (root / path).read_bytes()
        (root / path).write_bytes(content[: len(content) - 40])


def make_config(**changes):
    config = default_config()
    config.augment.update(image_size=8, crop="resized", eval_resize=10)
    config.data.resident = "host"
    for key, value in changes.items():
        group = config.augment if key in config.augment else config.data
        group[key] = value
    return config


def make_mesh(devices=8):
    return Mesh(np.array(jax.devices()[:devices]), ("data",))


def source_of(root):
    data = default_config().data
    data.update(name="folder", dir=str(root))
    return open_source(data)


def train_feed(root, devices=8, batch_size=8, seed=0, **changes):
    config = make_config(**changes)
    config.seed = seed
    return make_feed(source_of(root), make_mesh(devices), batch_size, config, split="train")


def eval_feed(root, devices=8, batch_size=8, **changes):
    return make_feed(source_of(root), make_mesh(devices), batch_size, make_config(**changes), split="eval")


def as_numpy(batch):
    return [np.asarray(leaf) for leaf in (batch.inputs, batch.labels, batch.index, batch.epoch)]


def assert_equal(one, other):
    for a, b in zip(as_numpy(one), as_numpy(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_batch_does_not_depend_on_devices_order_or_where_it_was_begun(tree):
    feed = train_feed(tree)
    steps = []
    for step in range(7):  # over two epoch boundaries
        with jax.transfer_guard("disallow"):
            steps.append(feed.train(step))
    for devices in (1, 2):
        other = train_feed(tree, devices)
        for step in (5, 6, 2):  # begun in the middle, streamed, gone back
            with jax.transfer_guard("disallow"):
                batch = other.train(step)
            assert_equal(batch, steps[step])
            for leaf, abstract in zip(jax.tree.leaves(batch), jax.tree.leaves(other.abstract_batch), strict=True):
                assert (leaf.shape, leaf.dtype, leaf.sharding) == (abstract.shape, abstract.dtype, abstract.sharding)
                assert len(leaf.sharding.device_set) == devices
        other.close()
    feed.close()


def test_every_image_comes_once_an_epoch_with_its_label_and_another_cut(tree):
    feed = train_feed(tree, batch_size=8)
    seen = collections.defaultdict(list)
    split = source_of(tree).load()[0]
    for step in range(feed.sampler.steps(2)):
        images, labels, index, epoch = as_numpy(feed.train(step))
        wanted = Sampler(EXAMPLES, 8, 0).indices(step)
        assert np.array_equal(index, wanted[0]) and np.array_equal(epoch, wanted[1])
        assert np.array_equal(labels, split.labels[index])
        for image, i, e in zip(images, index, epoch, strict=True):
            seen[i].append((e, image.tobytes()))
    feed.close()
    assert sum(len(cuts) for cuts in seen.values()) == 40  # 5 batches; all of epoch 0 and 19 of epoch 1
    assert [len([e for e, _ in seen[i] if e == 0]) for i in range(EXAMPLES)] == [1] * EXAMPLES
    assert all(len(set(cuts)) == len(cuts) for cuts in seen.values())


def test_worker_processes_give_what_threads_give_and_start_no_jax(tree, monkeypatch):
    damage(tree, "val/ant/03.png", "train/bee/05.png")
    threads = train_feed(tree, corrupt="replace")
    with pytest.warns(RuntimeWarning, match=r"bee/05\.png cannot be decoded"):
        wanted = [threads.train(step) for step in range(3)]
    with pytest.warns(RuntimeWarning, match=r"ant/03\.png cannot be decoded"):
        wanted_evaluation = list(eval_feed(tree, corrupt="replace").evaluation())
    monkeypatch.setenv("JAX_PLATFORMS", "none_such")  # inherited by the workers, where a backend could not start
    workers = train_feed(tree, corrupt="replace", workers=2)
    with pytest.warns(RuntimeWarning, match=r"bee/05\.png cannot be decoded"):
        for step in range(3):
            assert_equal(workers.train(step), wanted[step])
            for child in multiprocessing.active_children():  # as a scheduler does; the run decides when it stops
                os.kill(child.pid, signal.SIGTERM)
    assert len(multiprocessing.active_children()) == 2
    pool = workers._stream.gi_frame.f_locals["pool"]
    imported = pool.submit(eval, "[name for name in __import__('sys').modules if name.startswith(('jax', 'dpa_jax'))]")
    names = imported.result()
    assert "dpa_jax.data.feeds.read_ahead" in names and not [n for n in names if n.split(".")[0] in ("jax", "jaxlib")]
    workers.close()
    assert not multiprocessing.active_children()
    with pytest.warns(RuntimeWarning, match=r"ant/03\.png cannot be decoded"):
        found = list(eval_feed(tree, corrupt="replace", workers=1).evaluation())
    for one, other in zip(found, wanted_evaluation, strict=True):
        assert_equal(one, other)
    refusing = eval_feed(tree, workers=1)
    with pytest.raises(CorruptImageError, match=r"ant/03\.png cannot be decoded"):
        list(refusing.evaluation())


def test_a_worker_that_is_killed_ends_the_reading_with_an_error(tree):
    feed = train_feed(tree, workers=2)
    feed.train(0)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(BrokenProcessPool):
        for step in range(1, 9):
            feed.train(step)
    assert not multiprocessing.active_children()


ORPHAN = """
import multiprocessing, os, pathlib, signal, sys
import numpy as np
from dpa_jax.data.feeds.read_ahead import read_ahead
from dpa_jax.data.feeds.examples import EvalExamples
from dpa_jax.data.feeds.host_crop import EvalCrop
from dpa_jax.data.sources.folder import FolderSplit

if __name__ == "__main__":
    split = FolderSplit(pathlib.Path(sys.argv[1]), {"ant": ["00.png"]})
    reading = read_ahead(EvalExamples(split, EvalCrop(8, 8)), [np.array([0])] * 3, 1)
    next(reading)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_killed_parent(tree, tmp_path):
    (tmp_path / "orphan.py").write_text(ORPHAN)
    command = [sys.executable, str(tmp_path / "orphan.py"), str(tree / "train")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    (worker,) = map(int, ended.stdout.split())
    for _ in range(200):
        try:
            state = pathlib.Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"worker {worker} goes on without its parent")


def test_seeds_and_reordered_feeds_have_their_own_order_and_cuts(tree):
    feed = train_feed(tree)
    first = as_numpy(feed.train(0))
    other = feed.reordered(1)
    second = as_numpy(other.train(0))
    assert_equal(other.train(1), train_feed(tree, seed=1).train(1))
    assert not np.array_equal(first[2], second[2]) and not np.array_equal(first[0], second[0])
    assert as_numpy(feed.train(1))[3].tolist() == [0] * 8


def test_the_draws_are_for_ever():
    draws = uniform(seed=1, epoch=2, index=3)
    assert draws.shape == (DRAWS,) and draws.dtype == np.float32
    np.testing.assert_array_equal(
        draws[:3], np.array([0.24831974506378174, 0.04304468631744385, 0.607172966003418], np.float32)
    )
    many = np.stack([uniform(0, epoch, index) for epoch in range(20) for index in range(100)])
    assert 0 <= many.min() < 0.001 and 0.999 < many.max() < 1 and len(np.unique(many)) > 0.99 * many.size
    np.testing.assert_allclose(many.mean(0), 0.5, atol=4 / np.sqrt(12 * len(many)))


# ---------------- Cuts ----------------


def picture(height, width):
    coarse = Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 6, 3), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_training_cut_is_the_devices_cut_of_the_same_box(interpolation):
    image, crop = picture(40, 61), TrainCrop(12, "resized", (0.08, 1.0), (3 / 4, 4 / 3), interpolation)
    for index in range(5):
        draws = uniform(0, 0, index)
        box = augment.box_from_draws(draws[:-1], 40, 61, crop.scale, crop.ratio)
        on_device = np.asarray(augment.resized_crop(image, box, 12, interpolation)).astype(int)
        assert np.abs(crop(image, draws) - on_device).max() <= 2


def test_a_random_interpolation_is_one_of_the_two():
    image, scale, ratio = picture(40, 61), (0.08, 1.0), (3 / 4, 4 / 3)
    random, *both = (TrainCrop(12, "resized", scale, ratio, name) for name in ("random", "bilinear", "bicubic"))
    cubic = []
    for index in range(40):
        draws = uniform(0, 0, index)
        linear_cut, cubic_cut = (crop(image, draws) for crop in both)
        assert not np.array_equal(linear_cut, cubic_cut)
        cubic.append(np.array_equal(random(image, draws), cubic_cut))
        assert cubic[-1] or np.array_equal(random(image, draws), linear_cut)
    assert 8 < sum(cubic) < 32


def test_without_a_crop_the_whole_image_is_resized():
    crop = TrainCrop(12, "none", (0.08, 1.0), (3 / 4, 4 / 3), "random")
    image = picture(24, 36)
    expected = Image.fromarray(image).resize((12, 12), Image.Resampling.BILINEAR)
    assert np.array_equal(crop(image, uniform(0, 0, 0)), np.asarray(expected))


def test_an_evaluation_cut_is_the_middle_of_the_resized_image():
    square = picture(30, 30)
    on_device = augment.center_crop(augment.resize(square, 20), 16)
    assert np.abs(EvalCrop(16, 20)(square) - np.asarray(on_device).astype(int)).max() <= 2
    # Untouched where the shorter side is right already: the middle, of either orientation.
    wide = picture(20, 31)
    assert np.array_equal(EvalCrop(16, 20)(wide), wide[2:18, 8:24])
    assert np.array_equal(EvalCrop(16, 20)(wide.swapaxes(0, 1)), wide.swapaxes(0, 1)[8:24, 2:18])
    assert EvalCrop(16, 16)(picture(17, 500)).shape == (16, 16, 3)
    assert EvalCrop(16, 16)(picture(3, 5)).shape == (16, 16, 3)


def test_a_very_long_image_is_cut_before_it_is_resized():
    long = picture(1, 60_000)
    middle = np.array(Image.fromarray(long).resize((8 * 60_000, 8), Image.Resampling.BILINEAR))[:, 239_996:240_004]
    tracemalloc.start()
    cut, upright = EvalCrop(8, 8)(long), EvalCrop(8, 8)(long.swapaxes(0, 1))
    EvalCrop(224, 256)(long)  # 256 x 15,360,000 pixels, resized whole
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(cut, middle) and np.array_equal(upright, middle.swapaxes(0, 1)) and peak < 2**24
    # As before up to 64 times as long: resized whole, then cut.
    whole = picture(3, 192)
    resized = Image.fromarray(whole).resize((10 * 64, 10), Image.Resampling.BILINEAR)
    assert np.array_equal(EvalCrop(8, 10)(whole), np.asarray(resized)[1:9, 316:324])


# ---------------- Evaluation and corrupt images ----------------


@pytest.mark.parametrize("batch_size", [8, 16])
def test_evaluation_sees_the_whole_split_in_order_and_pads_the_end(tree, batch_size):
    feed, split, crop = eval_feed(tree, batch_size=batch_size), source_of(tree).load()[1], EvalCrop(8, 10)
    for _ in range(2):
        with jax.transfer_guard("disallow"):
            batches = list(feed.evaluation())
        images, labels, index, epoch = (np.concatenate(leaves) for leaves in zip(*map(as_numpy, batches), strict=True))
        assert len(images) == 16 and not epoch.any()
        assert index.tolist() == [*range(14), 0, 0] and labels.tolist() == [*split.labels, -1, -1]
        for i in range(14):
            assert np.array_equal(images[i], crop(split.read(i)))


def test_a_corrupt_image_stops_the_run_or_is_replaced_by_the_next(tree):
    damage(tree, "train/ant/11.png", "train/bee/00.png")  # one after the other, in two classes
    with pytest.raises(CorruptImageError, match=r"/train/\w+/\d\d\.png cannot be decoded: .*corrupt=replace$"):
        feed = train_feed(tree)
        for step in range(3):
            feed.train(step)
    feed, whole = train_feed(tree, corrupt="replace"), Sampler(EXAMPLES, 8, 0)
    with pytest.warns(RuntimeWarning) as caught:
        batches = [as_numpy(feed.train(step)) for step in range(2 * EXAMPLES // 8)]
    messages = {str(warning.message) for warning in caught}
    assert len(messages) == 2
    for name in ("ant/11", "bee/00"):
        assert any(f"{name}.png cannot be decoded" in m and "bee/01.png takes its place" in m for m in messages)
    for step, (images, labels, index, _) in enumerate(batches):
        wanted = whole.indices(step)[0]
        assert np.array_equal(index, np.where((wanted == 11) | (wanted == 12), 13, wanted))
        assert np.array_equal(labels, (index >= 12).astype(np.int32))  # its own label
        assert images.any(axis=(1, 2, 3)).all()


def test_in_an_evaluation_a_corrupt_image_counts_nowhere(tree):
    damage(tree, "val/bee/01.png")
    with pytest.raises(CorruptImageError, match=r"/val/bee/01\.png cannot be decoded: "):
        list(eval_feed(tree).evaluation())
    for resident in ("host", "device"):
        if resident == "device":
            make_tree(tree / "same", sizes=[(9, 9)])
            damage(tree / "same", "val/bee/01.png")
        root = tree / "same" if resident == "device" else tree
        with pytest.warns(RuntimeWarning, match=r"bee/01\.png cannot be decoded: .*; it counts nowhere"):
            feed = eval_feed(root, corrupt="replace", resident=resident)
            labels = np.concatenate([as_numpy(batch)[1] for batch in feed.evaluation()])
        assert labels[:14].tolist() == [0] * 8 + [1, -1, 1, 1, 1, 1]


def test_a_split_of_corrupt_images_alone_is_refused(tree):
    for path in (tree / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(CorruptImageError, match="nor can any other image of the split"):
        train_feed(tree, corrupt="replace").train(0)
    with pytest.raises(CorruptImageError, match="no image of the split can be decoded"):
        train_feed(tree, corrupt="replace", resident="device")


# ---------------- Where the images are kept ----------------


@pytest.mark.parametrize("resident", ["auto", "device"])
def test_images_of_one_size_that_fit_are_decoded_once(tmp_path, resident):
    root = make_tree(tmp_path, sizes=[(9, 12)])
    feed = train_feed(root, resident=resident, crop="pad")
    split = source_of(root).load()[0]
    assert isinstance(feed, MemoryFeed) and feed.resident == "device" and feed.inputs.shape == (9, 12, 3)
    decoded = feed.split
    assert isinstance(decoded, ArraySplit)
    assert np.array_equal(decoded.inputs, np.stack([split.read(i) for i in range(EXAMPLES)]))
    assert np.array_equal(decoded.labels, split.labels)
    config = make_config()
    assert feed.left_to_do(config.augment) == config.augment


def test_other_images_are_streamed(tree, tmp_path, monkeypatch):
    config = make_config()
    feed = train_feed(tree, resident="auto")
    assert isinstance(feed, StreamFeed) and feed.inputs.shape == (8, 8, 3)
    left = feed.left_to_do(config.augment)
    assert (left.crop, left.eval_resize) == ("none", 0) and config.augment.crop == "resized"
    assert left.flip == config.augment.flip and left.image_size == 8
    one_size = make_tree(tmp_path / "same", sizes=[(9, 12)])
    monkeypatch.setattr(base, "_CPU_BYTES", 2 * EXAMPLES * 9 * 12 * 3)
    assert isinstance(train_feed(one_size, devices=2, resident="auto"), MemoryFeed)
    assert isinstance(train_feed(one_size, devices=4, batch_size=4, resident="auto"), StreamFeed)


def test_images_of_several_sizes_cannot_be_resident(tree):
    with pytest.raises(ValueError, match=r"ant/00\.png is \(19, 14, 3\), .*ant/\d\d\.png is .*resident=host"):
        train_feed(tree, resident="device").load()


def test_a_resident_corrupt_image_is_refused_or_replaced(tmp_path):
    root = make_tree(tmp_path, sizes=[(9, 12)])
    damage(root, "train/ant/11.png")
    with pytest.raises(CorruptImageError, match=r"ant/11\.png cannot be decoded"):
        train_feed(root, resident="device").load()
    with pytest.warns(RuntimeWarning, match=r"ant/11\.png cannot be decoded: .*bee/00\.png takes its place"):
        split = train_feed(root, resident="auto", corrupt="replace").split
    assert np.array_equal(split.inputs[11], split.inputs[12]) and split.labels[11] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": "pad"}, r"augment\.crop=pad needs images of one size in memory; .* take resized or none"),
        ({"image_size": 0}, r"augment\.image_size must be set"),
        ({"batch_size": 12}, r"batch_size must be a positive multiple of the 8 devices, not 12"),
    ],
)
def test_what_streams_cannot_do_is_refused(tree, changes, message):
    with pytest.raises(ValueError, match=message):
        train_feed(tree, **changes)


def test_an_evaluation_size_that_the_cut_does_not_fit_into_is_refused(tree):
    with pytest.raises(ValueError, match=r"eval_resize must be 0 or at least augment\.image_size, 8; got 7"):
        eval_feed(tree, eval_resize=7)


def test_a_sampler_tells_single_places_and_goes_to_other_processes():
    sampler = pickle.loads(pickle.dumps(Sampler(21, 8, seed=3)))
    for step in (0, 2, 5):
        index, epoch = sampler.indices(step)
        assert [sampler.at(position) for position in range(8 * step, 8 * step + 8)] == list(
            zip(index, epoch, strict=True)
        )


# ---------------- Several processes ----------------

PROCESS = """
import hashlib, pathlib, sys
import jax
import numpy as np
from jax.sharding import Mesh

index, address, root = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(address, 2, index)
from dpa_jax.data.sources import open_source
from dpa_jax.data.feeds import make_feed
from dpa_jax.config import default_config

config = default_config()
config.augment.update(image_size=8, crop="resized", eval_resize=10)
config.data.resident = "host"
config.data.update(name="folder", dir=str(root))
source = open_source(config.data)
mesh = Mesh(np.array(jax.devices()), ("data",))
feed = make_feed(source, mesh, 8, config, split="train")
batches = [feed.train(step) for step in range(4)]
batches += make_feed(source, mesh, 8, config, split="eval").evaluation()
for batch in batches:
    for leaf in jax.tree.leaves(batch):
        for shard in leaf.addressable_shards:
            rows = shard.index[0]
            print("rows", rows.start, rows.stop, hashlib.sha256(np.asarray(shard.data).tobytes()).hexdigest())
jax.distributed.shutdown()
"""


def test_two_processes_read_the_halves_of_what_one_reads(tree):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    commands = [[sys.executable, "-c", PROCESS, str(index), address, str(tree)] for index in (0, 1)]
    processes = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    feed = train_feed(tree)
    batches = [*(feed.train(step) for step in range(4)), *eval_feed(tree).evaluation()]
    for index, process in enumerate(processes):
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        found = [line.split()[1:] for line in output.splitlines() if line.startswith("rows")]
        wanted = []
        for batch in batches:
            for leaf in jax.tree.leaves(batch):
                for start in (4 * index, 4 * index + 2):
                    digest = hashlib.sha256(np.asarray(leaf)[start : start + 2].tobytes()).hexdigest()
                    wanted.append([str(start), str(start + 2), digest])
        assert found == wanted
