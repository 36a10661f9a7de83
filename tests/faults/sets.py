"""Small sets in every format that is read, and reading them within bounds of time and memory."""

import contextlib
import hashlib
import io
import json
import pathlib
import pickle
import resource
import signal
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

from dpa_jax.config import default_config
from dpa_jax.data.sources import cifar, open_source
from tests.faults.harness import PACKAGE, Fault

NAMES = ("ant", "bee", "cat")
COUNTS = {"train": 6, "test": 3}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def pixels(number, shape=(8, 6, 3)):
    return np.random.default_rng(number).integers(0, 256, shape, np.uint8)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


# ---------------- Making them ----------------


def make_folder(root, counts=COUNTS, held_out="val"):
    """A folder a class: {split}/{class}/{number}.png."""
    for split, count in counts.items():
        for i in range(count):
            path = root / (held_out if split == "test" else split) / NAMES[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(pixels(i)))
    return root


def about(names=NAMES, **others):
    """Hugging Face's metadata of a file."""
    features = {"img": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}, **others}
    return json.dumps({"info": {"features": features}})


def write_parquet(path, labels, *, metadata=None, type=None, images=None, image_type=IMAGE, column="label"):
    """One file of labelled images; whatever is given takes the place of what would be right."""
    images = [{"bytes": encoded(pixels(i)), "path": None} for i in range(len(labels))] if images is None else images
    columns = {"img": pa.array(images, image_type)} | ({column: pa.array(labels, type)} if column else {})
    table = pa.table(columns).replace_schema_metadata({"huggingface": about() if metadata is None else metadata})
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(table, path, write_page_checksum=True)


def make_parquet(root):
    """`train` in two files, `test` in one."""
    write_parquet(root / "train-00000-of-00002.parquet", [0, 1, 2])
    write_parquet(root / "train-00001-of-00002.parquet", [0, 1, 2])
    write_parquet(root / "test-00000-of-00001.parquet", [2, 1, 0])
    return root


def make_prepared(root, name="small", version="1.0.0", shape=(8, 6, 3), label=None, edit=lambda example: example):
    """A set as TFDS prepares it; `edit` may change an example before it is written."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = root / name / version
    folder.mkdir(parents=True)
    kinds = {"image": tfds.features.Image(shape=(None, None, 3) if shape is None else shape)}
    kinds |= {"label": tfds.features.ClassLabel(names=NAMES), "note": tfds.features.Text()}
    features, infos = tfds.features.FeaturesDict(kinds), []
    for split, count in COUNTS.items():
        path = folder / f"{name}-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for i in range(count):
            example = {"image": io.BytesIO(encoded(pixels(i))), "label": i % 3 if label is None else label, "note": "x"}
            writer.write(edit(features.serialize_example(features.encode_example(example))))
        writer.close()
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=name, split=split, filetype_suffix="array_record"
        )
        info = {"shard_lengths": [count], "num_bytes": path.stat().st_size, "filename_template": template}
        infos.append(tfds.core.SplitInfo(name=split, **info))
    tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=infos, check_data=False)
    return folder


def make_cifar(folder, packed):
    """A small set as CIFAR is published, as an archive or a folder, and what is to be published of it."""
    files = {}
    for name, count in (("train_1", 4), ("test", 2)):
        labels = [i % 3 for i in range(count)]
        content = {b"data": pixels(count, (count, 3072)), b"fine_labels": labels}
        files[name] = pickle.dumps(content, protocol=3)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"small-python/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    folder.mkdir(parents=True, exist_ok=True)
    if packed:
        (folder / "small-python.tar.gz").write_bytes(file.getvalue())
    else:
        (folder / "small-python").mkdir()
        for name, content in files.items():
            (folder / "small-python" / name).write_bytes(content)
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    return cifar.Archive(
        name="small",
        url="https://example.invalid/small-python.tar.gz",
        md5=hashlib.md5(file.getvalue()).hexdigest(),
        folder="small-python",
        train={"train_1": sums["train_1"]},
        test={"test": sums["test"]},
        labels=b"fine_labels",
    )


# ---------------- Reading them ----------------


def opened(name, directory, **changes):
    data = default_config().data
    data.update({"name": name, "dir": str(directory), **changes})
    return open_source(data)


def content(splits):
    """[(images, labels)] of splits, every image decoded; a message stands for one that is corrupt."""
    from dpa_jax.data.images import CorruptImageError

    def image(split, i):
        try:
            return split.read(i).tobytes()
        except CorruptImageError as error:
            assert str(error).count("\n") == 0
            return str(error)

    found = []
    for split in splits:
        if hasattr(split, "inputs"):
            images = [one.tobytes() for one in split.inputs]
        else:
            images = [image(split, i) for i in range(len(split))]
        found.append((images, split.labels.tolist()))
    return found


def read(name, directory, **changes):
    """The content of a set."""
    return content(opened(name, directory, **changes).load())


def is_ours(error):
    """Whether it is an error of one line that is raised, or passed on from the system, by this package."""
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    ours = isinstance(error, OSError) or frame.tb_frame.f_code.co_filename.startswith(PACKAGE)
    recipe = "pip install" in str(error) or "python train.py" in str(error)  # how to get the set, in several lines
    return ours and type(error) is not UnicodeDecodeError and ("\n" not in str(error) or recipe)


@contextlib.contextmanager
def bounded(seconds=20, memory=2 * 2**30):
    """A block that must not take longer, nor so many bytes more than there were."""

    def too_long(*_):
        raise Fault("hang", f"more than {seconds} s")

    size = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, limits = signal.signal(signal.SIGALRM, too_long), resource.getrlimit(resource.RLIMIT_AS)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (size + memory, limits[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
