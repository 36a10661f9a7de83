"""BERT's lower-casing WordPiece tokenizer (Devlin et al., 2019).

Written here, and not that of the library ``tokenizers``: that one brings huggingface-hub with its network client, and
what is needed of it is the few lines below. Recorded ids of Hugging Face's tokenizer are their test.

Nothing here imports JAX.
"""

from __future__ import annotations

import pathlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from dpa_jax.data.sources import reading

PAD, UNKNOWN, FIRST, LAST, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_SPECIAL = re.compile(f"({'|'.join(map(re.escape, SPECIAL))})")
_SPACES = re.compile(r"[^\S\x0b\x0c\x1c-\x1f\x85]+")  # but for control characters, which vanish and part nothing
# The blocks of Chinese characters: from the first code to the last.
_CHINESE = [(0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2CEAF), (0xF900, 0xFAFF)]
_CHINESE += [(0x2F800, 0x2FA1F)]
_LONGEST = 100  # characters of a word that is looked up


class WordPiece:
    """Makes ids of texts.

    Args:
      tokens: the vocabulary, each at the position of its id; a piece that goes on with a word begins with ``##``.

    Raises:
      ValueError: it lacks [PAD], [UNK], [CLS] or [SEP].
    """

    def __init__(self, tokens: Sequence[str]):
        self.ids = {token: number for number, token in enumerate(tokens)}
        self.size = len(tokens)
        if missing := [token for token in (PAD, UNKNOWN, FIRST, LAST) if token not in self.ids]:
            raise ValueError(f"the vocabulary has no {missing[0]}")
        self._known: dict[str, list[int]] = {}  # ids of what stands between spaces

    def text(self, text: str) -> list[int]:
        """The ids of a text of any length, without [CLS] and [SEP]."""
        found: list[int] = []
        for chunk in _SPACES.split(text):
            if chunk not in self._known:
                self._known[chunk] = [number for word in words(chunk) for number in self._pieces(word)]
            found += self._known[chunk]
        return found

    def _pieces(self, word: str) -> list[int]:
        """The longest piece of the vocabulary that a word begins with, then that of its rest, and so on."""
        unknown, pieces, start = [self.ids[UNKNOWN]], list[int](), 0
        if len(word) > _LONGEST:
            return unknown
        while start < len(word):
            mark = "##" if start else ""
            ends = (end for end in range(len(word), start, -1) if mark + word[start:end] in self.ids)
            if (end := next(ends, 0)) == 0:
                return unknown
            pieces.append(self.ids[mark + word[start:end]])
            start = end
        return pieces

    def encode(self, texts: Iterable[str], length: int) -> dict[str, np.ndarray]:
        """[CLS], text and [SEP] of each text, cut to ``length`` tokens and padded with [PAD].

        Returns:
          ``input_ids``, ``attention_mask`` (1, and 0 for padding) and ``token_type_ids`` (0), int32 [N, length].
        """
        rows = [[self.ids[FIRST], *self.text(text)[: length - 2], self.ids[LAST]] for text in texts]
        ids = np.full((len(rows), length), self.ids[PAD], np.int32)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def words(text: str) -> list[str]:
    """The words of a text: lower case, without accents; punctuation, Chinese and special tokens are words each."""
    found: list[str] = []
    for i, part in enumerate(_SPECIAL.split(text)):
        found += [part] if i % 2 else "".join(map(_spaced, _cleaned(part))).split()
    return found


def _cleaned(text: str) -> str:
    """Without control characters and accents, in lower case; with spaces for what is like one."""
    spaced = _SPACES.sub(" ", text)
    shown = "".join(c for c in spaced if c != "\ufffd" and unicodedata.category(c)[0] != "C")
    return "".join(c for c in unicodedata.normalize("NFD", shown.lower()) if unicodedata.category(c) != "Mn")


def _spaced(character: str) -> str:
    """A character with spaces around it where it is a word of its own."""
    code = ord(character)
    symbol = 33 <= code <= 126 and not character.isalnum()
    apart = symbol or unicodedata.category(character)[0] == "P" or any(low <= code <= high for low, high in _CHINESE)
    return f" {character} " if apart else character


def build_vocabulary(texts: Iterable[str]) -> list[str]:
    """A vocabulary of whole words for training from scratch: those that occur twice or more, the most frequent first.

    Words that occur once are [UNK], which has something to learn from that way. Equally frequent words are sorted.

    Raises:
      ValueError: no word occurs twice.
    """
    chunks = Counter(chunk for text in texts for chunk in _SPACES.split(text))
    counts: Counter[str] = Counter()
    for chunk, count in chunks.items():
        counts.update({word: count * number for word, number in Counter(words(chunk)).items()})
    kept = [word for word, count in counts.items() if count > 1 and word not in SPECIAL]
    if not kept:
        raise ValueError("no word occurs twice in the training documents: there is no vocabulary left")
    return [*SPECIAL, *sorted(kept, key=lambda word: (-counts[word], word))]


def read_vocabulary(path: str) -> list[str]:
    """The tokens of a ``vocab.txt``, or of that in a Hugging Face folder: a line each, in the order of the ids.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not UTF-8, or ``tokenizer_config.json`` beside it is of a tokenizer that does not lower-case.
    """
    file = reading.folder_path(path)
    if file.is_dir():
        file /= "vocab.txt"
    if not file.is_file():
        raise FileNotFoundError(f"there is no vocabulary {file}")
    _check_tokenizer(file.with_name("tokenizer_config.json"))
    lines = reading.read_text(file).removesuffix("\n").split("\n")
    return [line.rstrip("\r") for line in lines]


def _check_tokenizer(file: pathlib.Path) -> None:
    if not file.is_file():
        return
    told = reading.read_object(file)
    for key in ("do_lower_case", "strip_accents", "tokenize_chinese_chars"):
        if told.get(key) is False:
            raise ValueError(f"{file} has {key} false; only lower-casing BERT vocabularies are read")
