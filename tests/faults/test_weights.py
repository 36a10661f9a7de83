"""Files of weights that are damaged, hostile or another model's: one line says what is wrong, and nothing is run."""

import functools
import io
import itertools
import json
import os
import pickle
import struct
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import dpa_jax
from dpa_jax.models import to_torch, variables_from_torch
from dpa_jax.models.weight_files import read_weights
from tests import pth
from tests.faults import sets
from tests.faults.harness import TINY, Fault
from tests.faults.test_readers import _damages, _often, damaged

A, HOOKS = np.arange(6, dtype=np.float32).reshape(2, 3), pth.reduced("collections", "OrderedDict")


@functools.cache
def model():
    return dpa_jax.models.create("vit", 4, image_size=8, in_channels=1, patch_size=4, embed_dim=8, depth=1, num_heads=1)


@functools.cache
def arrays():
    """A state dict of `model`."""
    abstract = jax.eval_shape(model().init, jax.random.key(0), model().example_inputs)
    generator = np.random.default_rng(0)
    return to_torch(model(), jax.tree.map(lambda leaf: generator.random(leaf.shape, np.float32), abstract))


def refused(case, content, *words, read=read_weights):
    """The file is refused in one line that names it and has all the words; within seconds, and 2 GB."""
    path = case.folder / "weights"
    path.write_bytes(content)
    with case.raises(path.name, *words), sets.bounded():
        try:
            read(path)
        except (ValueError, OSError) as error:
            if not sets.is_ours(error):
                raise Fault("traceback", repr(error)) from error
            raise


# ---------------- pickles that ask for more than tensors ----------------


class Runs:
    """Leaves a mark where its pickle is loaded by Python's unpickler."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def marking(case):
    return Runs(os.system, f"touch {case.folder / 'mark'}")


def by_python(value, protocol=2):
    return pickle.dumps(value, protocol)


CALLS = {
    "os.system": lambda case: by_python({"a": marking(case)}),
    "alone": lambda case: by_python(marking(case)),
    "eval": lambda case: by_python({"a": Runs(eval, f"open({str(case.folder / 'mark')!r}, 'w')")}),
    "protocol 4": lambda case: by_python({"a": marking(case)}, 4),
    "protocol 0": lambda case: by_python({"a": marking(case)}, 0),
    "INST": lambda case: b"(S'touch mark'\nios\nsystem\n.",
    "OBJ": lambda case: b"(cos\nsystem\nU\x0atouch marko.",
    "NEWOBJ": lambda case: b"\x80\x02cos\nsystem\n(U\x0atouch markt\x81.",
    "EXT1": lambda case: b"\x80\x02\x82\x01.",
    "a name that begins well": lambda case: b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
    "another of torch's functions": lambda case: b"\x80\x02ctorch.hub\nload\n(t R.",
    "a module of torch's": lambda case: b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81.",
    "a number of numpy's": lambda case: by_python({"a": np.zeros(2), "best": np.float64(3)}),
    "a set": lambda case: by_python({"a": {1, 2}}),
    "a persistent text": lambda case: b"Pstorage\n.",
    "a hook of an OrderedDict": lambda case: b"\x80\x02" + HOOKS + b"cos\nsystem\nb.",
}


@pytest.mark.parametrize("container", ["zip", "old"])
@pytest.mark.parametrize("name", CALLS)
def test_a_pickle_that_asks_for_more(case, name, container, monkeypatch):
    monkeypatch.chdir(case.folder)
    pickled = CALLS[name](case)
    if container == "zip":
        content = pth.zipped(None, pickled=pickled)
    else:
        content = b"".join([pth.MAGIC, by_python(1001), by_python({"little_endian": True}), pickled, by_python([])])
    words = ("it asks for", "no code of it was run") if b"system" in pickled and name not in _BY_OPERATION else ()
    refused(case, content, *words)
    if (case.folder / "mark").exists():
        case.code(name)


_BY_OPERATION = ("INST", "protocol 4", "protocol 0")  # refused for their operations, before anything is named


# ---------------- pickles that make no sense ----------------


def tensor_of(**changes):
    parts = {"storage": pth.storage("0", 6), "offset": 0, "shape": (2, 3), "strides": (3, 1), **changes}
    arguments = [part if isinstance(part, bytes) else pth.number(part) for part in parts.values()]
    return pth.reduced("torch._utils", "_rebuild_tensor_v2", *arguments, pth.number(False), HOOKS)


TENSORS = {
    "beyond its storage": tensor_of(offset=1),
    "far beyond its storage": tensor_of(offset=2**40),
    "of strides beyond its storage": tensor_of(strides=(4, 1)),
    "of strides that overflow": tensor_of(strides=(2**47, 2**47)),
    "of a size that overflows": tensor_of(shape=(2**40, 2**40), strides=(0, 0)),
    "that repeats one number": tensor_of(shape=(2**20, 2**20), strides=(0, 0)),
    "of nothing, and much of it": tensor_of(shape=(0, 2**40, 2**40), strides=(1, 1, 1)),
    "of a negative size": tensor_of(shape=(-2, 3)),
    "of a negative stride": tensor_of(strides=(-3, 1)),
    "of a negative offset": tensor_of(offset=-1),
    "of fractions": tensor_of(shape=(2.0, 3)),
    "of truths": tensor_of(shape=(True, True)),
    "with fewer strides": tensor_of(strides=(3,)),
    "of 100 axes": tensor_of(shape=(1,) * 100, strides=(1,) * 100),
    "of lists": tensor_of(shape=[2, 3]),
    "without a storage": tensor_of(storage=b"N"),
    "of a tensor": tensor_of(storage=pth.tensor("0", (2, 3))),
    "of too few arguments": pth.reduced("torch._utils", "_rebuild_tensor_v2", pth.storage("0", 6)),
    "of nothing at all": pth.reduced("torch._utils", "_rebuild_tensor_v2"),
    "of a parameter of nothing": pth.reduced("torch._utils", "_rebuild_parameter", b"N"),
    "of a storage that is missing": tensor_of(storage=pth.storage("7", 6)),
    "of a storage outside": tensor_of(storage=pth.storage("../../byteorder", 6)),
    "of a storage that is smaller": tensor_of(storage=pth.storage("0", 7)),
    "of a storage of 4 EiB": tensor_of(storage=pth.storage("0", 2**60)),
    "of a storage of another kind": tensor_of(storage=pth.storage("0", 6, "Double")),
    "of a storage of negative size": tensor_of(storage=pth.storage("0", -6)),
    "of a storage of no kind": tensor_of(storage=b"(" + pth.text("storage") + b"N" * 4 + b"tQ"),
    "of a storage of nothing": tensor_of(storage=b")Q"),
    "of a storage that is a text": tensor_of(storage=pth.text("storage") + b"Q"),
    "of complex numbers": tensor_of(storage=pth.storage("0", 3, "ComplexFloat")),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("write", [pth.zipped, pth.old], ids=["zip", "old"])
def test_a_tensor(case, name, write):
    more = {"more": {"data/0": A.tobytes()}} if write is pth.zipped else {"blocks": {"0": (6, A.tobytes())}}
    refused(case, write({"a": pth.Raw(TENSORS[name])}, **more))


PICKLES = {
    "nothing": b"",
    "its end alone": b".",
    "no end": b"\x80\x02}",
    "a mark that is missing": b"\x80\x02t.",
    "a memo that is missing": b"\x80\x02h\x05.",
    "a memo at 2 billion": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a text of 4 GB": b"\x80\x02X\xff\xff\xff\xffabc.",
    "a text of 8 EiB": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fabc.",
    "bytes of 8 EiB": b"\x80\x05\x96" + b"\xff" * 7 + b"\x7fabc.",
    "a number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7fabc.",
    "a number of many digits": b"L" + b"9" * 10**6 + b"L\n.",
    "an unknown operation": b"\x80\x02\xff.",
    "a key that is a list": b"\x80\x02}]Ns.",
    "a key that is a tuple, 200,000 deep": b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.",
    "an item of no dict": b"\x80\x02NNNs.",
    "an item of no list": b"\x80\x02}Na.",
    "a key without a value": b"\x80\x02}(" + pth.text("a") + b"u.",
    "a call of a number": b"\x80\x02K\x01)R.",
    "a call with a list": b"\x80\x02" + HOOKS[:-2] + b"]R.",
    "a million lists": b"\x80\x02" + b"]" * 10**6 + b".",
    "three million lists": b"\x80\x02" + b"]" * 3 * 10**6 + b".",
    "a dict in itself": b"\x80\x02}q\x00" + pth.text("model") + b"h\x00s.",
    "dicts in dicts": b"\x80\x02" + (b"}" + pth.text("model")) * 9 + b"}" + b"s" * 9 + b".",
    "a list": b"\x80\x02].",
    "a number": b"\x80\x02K\x01.",
    "a text": b"\x80\x02" + pth.text("a\nb") + b".",
    "no tensors": b"\x80\x02" + pth.written({"a\nb": 1, "state": {"c": 2}}, {}) + b".",
    "tensors in a list": b"\x80\x02" + pth.written([A], {}) + b".",
    "a name in UTF-8 that is none": b"\x80\x02}X\x02\x00\x00\x00\xff\xfeNs.",
    "a function in UTF-8 that is none": b"\x80\x02c\xff\n\xfe\n.",
    "pairs, of which one is none": b"\x80\x02" + pth.reduced("collections", "OrderedDict", b"](K\x01e") + b".",
    "pairs of three": b"\x80\x02" + pth.reduced("collections", "OrderedDict", b"](](K\x01K\x01K\x01ee") + b".",
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle(case, name):
    refused(case, pth.zipped(None, pickled=PICKLES[name]))


def test_pairs_of_a_long_list_again_and_again(case):
    """Each of a thousand dicts is made of the same 100,000 pairs."""
    many = b"\x80\x02](" + b"](K\x01K\x01e" * 10**5 + b"eq\x00" + b"ccollections\nOrderedDict\nq\x010"
    refused(case, pth.zipped(None, pickled=many + b"h\x01h\x00\x85R0" * 1000 + b"N."))


# ---------------- containers ----------------


def truncated(content, share):
    return content[: int(share * len(content))]


WRITERS = {
    "zip": pth.zipped,
    "old": pth.old,
    "safetensors": lambda tree: safetensors.numpy.save(tree),
}


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("kind", WRITERS)
def test_the_end_is_missing(case, kind, share):
    refused(case, truncated(WRITERS[kind](arrays()), share))


def encrypted():
    content = bytearray(pth.zipped({"a": A}))
    for at in itertools.chain(_all(content, b"PK\x03\x04", 6), _all(content, b"PK\x01\x02", 8)):
        content[at] |= 1
    return bytes(content)


def _all(content, mark, offset):
    at = content.find(mark)
    while at >= 0:
        yield at + offset
        at = content.find(mark, at + 1)


def archive(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def larger():
    """Says that its storage has 4 GB."""
    content = bytearray(pth.zipped({"a": A}))
    (at,) = [at for at in _all(content, b"PK\x01\x02", 0) if content[at + 46 :].startswith(b"archive/data/0")]
    content[at + 20 : at + 28] = struct.pack("<II", 2**32 - 2, 2**32 - 2)
    return bytes(content)


CONTAINERS = {
    "a folder of numpy's": (lambda: _npz(), "no data.pkl"),
    "an empty zip": (lambda: archive({}), ""),
    "a zip of something": (lambda: archive({"a/b": b"c"}), "no data.pkl"),
    "two pickles": (lambda: archive({"a/data.pkl": b"N.", "b/data.pkl": b"N."}), "no data.pkl"),
    "a TorchScript archive": (lambda: pth.zipped({"a": A}, more={"constants.pkl": b"N."}), "TorchScript"),
    "big-endian": (lambda: pth.zipped({"a": A}, more={"byteorder": b"big"}), "little-endian"),
    "compressed": (lambda: pth.zipped({"a": A}, compression=zipfile.ZIP_DEFLATED), "compressed"),
    "a bomb": (
        lambda: pth.zipped({}, more={"data.pkl": bytes(2**28)}, compression=zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    "LZMA": (lambda: pth.zipped({"a": A}, compression=zipfile.ZIP_LZMA), "compressed"),
    "encrypted": (encrypted, "encrypted"),
    "larger than the file": (larger, ""),
    "a wrong sum": (lambda: pth.zipped({"a": A}).replace(A.tobytes(), A.tobytes()[::-1]), "CRC"),
    "an old one of another protocol": (lambda: pth.old({"a": A}, protocol=1000), "damaged"),
    "an old one that is big-endian": (lambda: pth.old({"a": A}, machine={"little_endian": False}), "little-endian"),
    "an old one of no machine": (lambda: pth.old({"a": A}, machine=3), "damaged"),
    "an old one without storages": (lambda: pth.old({"a": A}, blocks={}), "storage"),
    "an old one with others": (lambda: pth.old({"a": A}, blocks={"9": (6, A.tobytes())}), "storages"),
    "an old one with more": (lambda: pth.old({"a": A}, blocks={"0": (2**62, b"")}), "storages"),
    "an old one with fewer": (lambda: pth.old({"a": A}, blocks={"0": (-6, A.tobytes())}), "storages"),
    "a page of the web": (lambda: b"<!DOCTYPE html><html>404</html>", "neither"),
    "a pointer of git's": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "neither"),
    "a pickle of Python's": (lambda: by_python({"a": 1}, 4), "neither"),
    "a gzip": (lambda: b"\x1f\x8b" + bytes(100), "neither"),
    "zeros": (lambda: bytes(1000), "neither"),
}


def _npz():
    file = io.BytesIO()
    np.savez(file, a=A)
    return file.getvalue()


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container(case, name):
    make, word = CONTAINERS[name]
    refused(case, make(), *([word] if word else []))


# ---------------- safetensors ----------------


def header(tensors, data=None, length=None):
    data = A.tobytes() if data is None else data
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


SAFETENSORS = {
    "a header of 16 EiB": header({"a": entry()}, length=2**64 - 1),
    "a header beyond the file": header({"a": entry()}, length=10**6),
    "a header that is too short": header({"a": entry()}, length=9),
    "an empty header": header({}),
    "no JSON": header(b"{not JSON}"),
    "no object": header(b"{}[]"),
    "no UTF-8": header(b'{"\xff": 1}'),
    "100,000 deep": header(b'{"a":' * 100_000),
    "no entry": header({"a": 3}),
    "no shape": header({"a": {"dtype": "F32", "data_offsets": [0, 24]}}),
    "beyond the file": header({"a": entry(shape=(4, 3), offsets=(0, 48))}),
    "far beyond the file": header({"a": entry(shape=(2**60,), offsets=(0, 2**62))}),
    "offsets that overflow": header({"a": entry(offsets=(0, 2**64 - 1))}),
    "offsets in the wrong order": header({"a": entry(offsets=(24, 0))}),
    "negative offsets": header({"a": entry(offsets=(-24, 0))}),
    "a hole": header({"a": entry(shape=(3,), offsets=(12, 24))}),
    "an overlap": header({"a": entry(), "b": entry(shape=(3,), offsets=(0, 12))}),
    "another size": header({"a": entry(shape=(2, 2))}),
    "a size that overflows": header({"a": entry(shape=(2**40, 2**40))}),
    "a negative size": header({"a": entry(shape=(-2, -3))}),
    "a fraction": header({"a": entry(shape=(2.5, 3))}),
    "an unknown dtype": header({"a": entry(dtype="X32")}),
    "a dtype that is not read": header({"a": entry(dtype="F8_E4M3", shape=(24,))}),
    "trailing bytes": header({"a": entry()}, A.tobytes() + b"more"),
    "metadata that are no texts": header({"__metadata__": {"a": 1}, "a": entry()}),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_safetensors_file(case, name):
    refused(case, SAFETENSORS[name])


# ---------------- bytes at random ----------------


def tried(case, content, check=lambda found: True):
    """Reads a file once; what comes of it must be an error of ours or something that is right."""
    path = case.folder / "weights"
    path.write_bytes(content)
    case.tried += 1
    try:
        with sets.bounded():
            found = read_weights(path)
    except (ValueError, OSError) as error:
        if not sets.is_ours(error):
            raise Fault("traceback", repr(error)) from error
    except Fault:
        raise
    except Exception as error:
        raise Fault("traceback", repr(error)) from error
    else:
        if not check(found):
            raise Fault("silent", f"other arrays: {list(found)}"[:2000])


@pytest.mark.parametrize("kind", WRITERS)
def test_bytes_changed_cut_out_and_put_in(case, kind):
    """The weights as they were, or an error. The old form and safetensors have no sums: there names may be others."""
    wanted = arrays()
    content = WRITERS[kind](wanted)

    def same(found):
        return found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)

    @_often
    @given(_damages)
    def check(damages):
        tried(case, damaged(content, damages), same if kind == "zip" else lambda found: True)

    check()


def test_any_bytes_as_a_pickle(case):
    @_often
    @given(st.binary(max_size=300))
    def check(content):
        tried(case, pth.zipped(None, pickled=b"\x80\x02" + content + b"."))

    check()


# ---------------- weights of another model ----------------


def other(**sizes):
    options = {"image_size": 8, "in_channels": 1, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1, **sizes}
    made = dpa_jax.models.create("vit", 4, **options)
    abstract = jax.eval_shape(made.init, jax.random.key(0), made.example_inputs)
    return to_torch(made, jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract))


WITHOUT = dict(itertools.islice(arrays().items(), 3))
OTHERS = {
    "AlexNet": (
        {"features.0.weight": np.zeros((64, 3, 11, 11), np.float32)},
        "'features.0.weight'",
        "no parameter of ViT",
    ),
    "one block more": (other(depth=2), "'blocks.1.", "no parameter of ViT"),
    "another width": (other(embed_dim=12), "has shape", "12", "8"),
    "another patch": (other(patch_size=2), "has shape", "(8, 1, 2, 2)", "(8, 1, 4, 4)"),
    "colour": (other(in_channels=3), "has shape", "(8, 3, 4, 4)", "(8, 1, 4, 4)"),
    "another MLP": (other(mlp_ratio=2.0), "has shape", "16", "32"),
    "no head": ({n: a for n, a in arrays().items() if "head" not in n}, "no array given for 'head.bias'"),
    "a head transposed": ({**arrays(), "head.weight": arrays()["head.weight"].T}, "(8, 4)", "(4, 8)"),
    "a part of it": (WITHOUT, "no array given"),
    "infinities": ({**arrays(), "norm.bias": np.full(8, np.inf, np.float32)}, "norm.bias", "finite"),
    "whole numbers": ({**arrays(), "norm.bias": np.zeros(8, np.int64)}, "norm.bias", "floating"),
    "three positions": (
        {**arrays(), "pos_embed": np.zeros((1, 4, 8), np.float32)},
        "pos_embed",
        "(1, 4, 8)",
        "(1, 5, 8)",
    ),
    "a name twice": ({f"{p}{n}": a for n, a in arrays().items() for p in ("", "module.")}, "module.", "no parameter"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", ["zip", "safetensors"])
def test_weights_of_another_model(case, name, kind):
    tree, *words = OTHERS[name]
    tree = {name: np.ascontiguousarray(array) for name, array in tree.items()}
    refused(case, WRITERS[kind](tree), *words, read=lambda path: variables_from_torch(model(), path, {}))


def test_a_state_dict_with_other_things_in_it(case):
    refused(
        case,
        pth.zipped({**arrays(), "epoch": 3}),
        "'epoch'",
        "no parameter of ViT",
        read=lambda path: variables_from_torch(model(), path, {}),
    )


@pytest.mark.parametrize("what", ["missing", "a folder", "a pipe", "a name with a zero"])
def test_what_is_no_file(case, what):
    path = case.folder / "weights"
    if what == "a folder":
        path.mkdir()
    elif what == "a pipe":
        os.mkfifo(path)
    with case.raises("there is no file"), sets.bounded():
        read_weights("a\0b" if what == "a name with a zero" else path)


def test_a_file_larger_than_the_memory(case):
    path = case.folder / "weights"
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(2**43)
    with case.raises("weights", "would take", "GB"), sets.bounded():
        read_weights(path)


# ---------------- train.py ----------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda case: None, ("init_from", "there is no file")),
        (lambda case: pth.zipped(None, pickled=by_python({"a": marking(case)})), ("init_from", "system", "no code")),
        (lambda case: WRITERS["safetensors"](other(in_channels=3)), ("init_from", "(8, 3, 4, 4)", "(8, 1, 4, 4)")),
    ],
    ids=["missing", "code", "another model's"],
)
def test_a_training_from_a_file(case, make, words):
    content = make(case)
    if content is not None:
        (case.folder / "weights").write_bytes(content)
    case.refused(case.train(*TINY, "--config.init_from=weights"), *words)
    if (case.folder / "mark").exists():
        case.code("a training")


def test_a_training_from_a_file_that_fits(case):
    (case.folder / "weights").write_bytes(pth.zipped({"model": other()}))
    case.finished(case.train(*TINY, "--config.init_from=weights"), "weights (SHA-256", "20 of 20 arrays loaded")


def test_an_evaluation_needs_no_file(case):
    """Of a run whose weights are gone."""
    (case.folder / "weights").write_bytes(pth.zipped({"model": other()}))
    arguments = (*TINY, "--config.init_from=weights", "--config.epochs=1")
    case.finished(case.train(*arguments))
    (case.folder / "weights").unlink()
    case.finished(case.train(*arguments, "--eval"))
    case.finished(case.train(*arguments), "nothing left to do")
