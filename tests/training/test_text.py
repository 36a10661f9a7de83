"""Texts through the same loop as images: trained, stopped and continued, and fine-tuned from a folder."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from dpa_jax.config import default_config
from dpa_jax.data.feeds.memory import MemoryFeed
from dpa_jax.data.sources import open_source
from dpa_jax.models import create, to_torch
from dpa_jax.models.bert import SIZES
from dpa_jax.training.loop import _weights_of, train, train_and_evaluate
from dpa_jax.training.run import build

pytestmark = pytest.mark.usefixtures("compile_quickly")

NUMBERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
WORDS = [f"{a}{b}" for a in "klmn" for b in ("a", "e", "i", "o", "u")]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """40 training and 16 test documents of made-up words; a class has ten words of its own."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS[i % 2 * 10 :][:10], rng.integers(3, 12))) for i in range(56)]
    split = [f"{i}\t{'train' if i < 40 else 'test'}\t{'ab'[i % 2]}" for i in range(56)]
    path = tmp_path_factory.mktemp("documents") / "own"
    path.with_name("own.clean.txt").write_text("\n".join(texts))
    path.with_name("own.split.txt").write_text("\n".join(split))
    return path


def text_config(documents, **data):
    config = default_config()
    config.model, config.model_options = "bert", {**NUMBERS, "max_position_embeddings": 12}
    config.update(batch_size=8, eval_batch_size=8, epochs=4)
    config.optimizer.learning_rate = 0.01
    config.data.update(name=f"text:{documents}", max_length=8, **data)
    return config


def record(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


@pytest.mark.core
def test_a_run_learns_and_goes_on_with_the_same_bits(documents, tmp_path, monkeypatch):
    run = build(text_config(documents))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    (records,) = train(run, whole, [whole])
    assert records[-1]["eval_top1"] == 1.0
    assert records[-1]["masked_fraction"] > 0

    def fail(feed, step, inner=MemoryFeed.train):
        if step == 13:
            raise RuntimeError("stopped")
        return inner(feed, step)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(MemoryFeed, "train", fail)
        train(run, stopped, [stopped])
    assert len(record(stopped)) < len(record(whole))
    train(run, stopped, [stopped])
    assert record(stopped) == record(whole)


def test_what_a_source_of_tokens_has(documents):
    source = open_source(text_config(documents).data)
    assert (source.spec.class_names, source.spec.train_examples, source.spec.test_examples) == (("a", "b"), 40, 16)
    assert source.spec.model_options() == {"vocab_size": 5 + len(WORDS), "sequence_length": 8}
    train_split, test_split = source.load()
    assert train_split.labels.tolist() == [0, 1] * 20
    assert test_split.labels.tolist() == [0, 1] * 8
    assert list(source.class_counts()) == [20, 20]
    ids, mask = train_split.inputs["input_ids"], train_split.inputs["attention_mask"]
    assert ids.shape == (40, 8)
    assert (ids[:, 0] == 2).all()
    assert ((ids == 3).sum(1) == 1).all()
    assert ((ids != 0) == (mask == 1)).all()


def folder_of(model, path):
    """A made-up Hugging Face folder of a model, with a vocabulary that has the documents' words as pieces."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), model.example_inputs)
    rng = np.random.default_rng(1)
    arrays = to_torch(model, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes))
    path.mkdir()
    safetensors.numpy.save_file(arrays, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "bert", **{n: getattr(model, n) for n in SIZES}}))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"klmn", "##a", "##e", "##i", "##o", "##u"]
    (path / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return arrays


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "bert"
    options = {**NUMBERS, "vocab_size": 13, "max_position_embeddings": 12, "sequence_length": 8}
    return folder, folder_of(create("bert", 3, **options), folder)


def test_fine_tuning_begins_with_a_folder(documents, published):
    folder, arrays = published
    config = text_config(documents, vocab=str(folder))
    config.init_from = f"{folder}/"
    run = build(config)
    with pytest.warns(UserWarning, match="classifier is for 3 classes, not 2: it stays fresh"):
        params = jax.device_get(run.init().params)
    np.testing.assert_array_equal(
        params["word_embeddings"]["embedding"], arrays["bert.embeddings.word_embeddings.weight"]
    )
    (line,) = _weights_of(run)
    assert line.startswith(f"{folder}/ (SHA-256 ")
    assert "39 of 41 arrays loaded; classifier is for 3 classes, not 2: it stays fresh" in line


def refused(config, message, tmp_path, error=ValueError):
    with pytest.raises(error, match=message) as told:
        train_and_evaluate(config, tmp_path)
    assert "\n" not in str(told.value)


def test_what_does_not_go_together_is_told_before_the_data_are_loaded(documents, published, tmp_path, monkeypatch):
    folder, _ = published
    monkeypatch.setattr(MemoryFeed, "load", lambda feed: pytest.fail("it was loaded"))
    config = text_config(documents)
    config.init_from = str(folder)
    message = (
        "config: init_from: .*config.json: vocab_size is 13, the model's 25; give the model these sizes, and the d"
    )
    refused(config, message, tmp_path)
    config = text_config(documents, vocab=str(documents.parent))
    refused(config, "data.vocab .*: there is no vocabulary .*/vocab.txt", tmp_path, FileNotFoundError)
    config = text_config(documents)
    config.augment.mixup = 0.2
    refused(config, "config: augment.mixup is for images, which data 'text:.*' has not", tmp_path)
    config = text_config(documents)
    config.model, config.model_options = "vit", {"image_size": 8}
    refused(config, "config: model 'vit' does not take data 'text:.*': it has no sequence_length", tmp_path)
    config.data.name = "digits"
    config.model, config.model_options = "bert", NUMBERS
    refused(config, "config: model 'bert' does not take data 'digits': it has no in_channels", tmp_path)
    path = documents.with_name("once")
    path.with_name("once.clean.txt").write_text("one\ntwo")
    path.with_name("once.split.txt").write_text("0\ttrain\ta\n1\ttest\ta")
    refused(text_config(path), "no word occurs twice in the training documents: there is no vocabulary", tmp_path)
