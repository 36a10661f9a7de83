"""WordPiece against Hugging Face's recorded tokens, and vocabularies."""

import json

import pytest

from dpa_jax.data.sources.wordpiece import SPECIAL, WordPiece, build_vocabulary, read_vocabulary
from tests.conftest import GOLDEN


def test_ids_and_masks_are_hugging_faces():
    recorded = json.loads((GOLDEN / "graph" / "wordpiece.json").read_text())
    tokenizer = WordPiece(recorded["vocab"])
    found = [[recorded["vocab"][number] for number in tokenizer.text(text)] for text in recorded["texts"]]
    assert found == recorded["tokens"]
    assert set(recorded["encoded_by_max_length"]) == {"8", "24"}
    for length, expected in recorded["encoded_by_max_length"].items():
        encoded = tokenizer.encode(recorded["texts"], int(length))
        assert {array.dtype.name for array in encoded.values()} == {"int32"}
        assert not encoded.pop("token_type_ids").any()
        assert {name: array.tolist() for name, array in encoded.items()} == expected


def test_control_characters_vanish_and_other_spaces_part():
    tokenizer = WordPiece([*SPECIAL, "ab", "cd", "abcd"])
    assert tokenizer.text("ab\x0bcd\x1c ab\x85cd\u2028ab\u3000cd\x00") == [7, 7, 5, 6]


def test_a_vocabulary_of_words_that_occur_twice():
    texts = ["The cat, the dog", "a CAT [SEP] [SEP]", "a bird"]
    assert build_vocabulary(texts) == [*SPECIAL, "a", "cat", "the"]
    assert WordPiece(build_vocabulary(texts)).text("the birds a") == [7, 1, 5]
    with pytest.raises(ValueError, match=r"no word occurs twice .* there is no vocabulary left"):
        build_vocabulary(["one two", "three"])


def test_a_vocabulary_from_a_file_or_a_folder(tmp_path):
    (tmp_path / "vocab.txt").write_bytes("\n".join([*SPECIAL, "é\r", "", "##b", ""]).encode())
    expected = [*SPECIAL, "é", "", "##b"]
    assert read_vocabulary(str(tmp_path)) == read_vocabulary(str(tmp_path / "vocab.txt")) == expected
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert read_vocabulary(str(tmp_path)) == expected
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    with pytest.raises(ValueError, match=r"tokenizer_config.json has do_lower_case false; only lower-casing"):
        read_vocabulary(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"there is no vocabulary .*/none/vocab.txt"):
        (tmp_path / "none").mkdir()
        read_vocabulary(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"the vocabulary has no \[UNK\]"):
        WordPiece(["[PAD]", "[CLS]", "[SEP]"])
