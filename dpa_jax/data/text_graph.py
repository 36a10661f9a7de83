"""Documents and their words as one graph, after TextGCN (Yao et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpa_jax.data.graphs import symmetric_graph
from dpa_jax.models.graph import Graph

WINDOW = 20
"""Words that count as near each other."""


def text_graph(documents: Sequence[str], num_train: int) -> tuple[Graph, list[str]]:
    """The graph of documents and their words, which have no features, and the vocabulary, sorted.

    The nodes are the first ``num_train`` documents, the words, and the other documents. A document and a word in it are
    joined with the weight TF-IDF, the count in the document times ln(documents / documents with the word). Two words
    are joined with their pointwise mutual information ln(#(i, j) #W / (#W(i) #W(j))), where that is more than 0. #W
    are all windows of `WINDOW` words, which slide by one word over each document; #W(i) those with word i; #(i, j) the
    pairs of positions of i and j within windows, so that a word that comes twice counts twice, as in the authors'
    program.

    Raises:
        ValueError: for a document without words.
    """
    words = [document.split() for document in documents]
    if empty := [i for i, found in enumerate(words) if not found]:
        raise ValueError(f"document {empty[0] + 1} of {len(words)} has no words")
    lengths = np.array([len(found) for found in words])
    vocabulary, flat = np.unique([word for found in words for word in found], return_inverse=True)
    size, last_start = len(vocabulary), np.maximum(lengths - WINDOW, 0)

    document = np.repeat(np.arange(len(words)), lengths)
    position = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    first, second, pmi = _pmi(flat, document, position, last_start, size)
    in_document, word, tf_idf = _tf_idf(flat, document, len(words), size)

    # Training documents, words, other documents.
    node = np.arange(len(words)) + np.where(np.arange(len(words)) < num_train, 0, size)
    graph = symmetric_graph(
        np.zeros((len(words) + size, 0), np.float32),
        np.append(first + num_train, node[in_document]),
        np.append(second + num_train, word + num_train),
        np.append(pmi, tf_idf),
    )
    return graph, vocabulary.tolist()


def _pmi(
    words: np.ndarray, document: np.ndarray, position: np.ndarray, last_start: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of words i < j and their PMI, of those that have more than 0.

    Of a text as word numbers [T], the document and the position in it of each, and the last window's start in every
    document. No window is looked at: which ones hold a position, or two, follows from the positions.
    """
    import scipy.sparse

    last = last_start[document]
    starts, ends = np.maximum(position - WINDOW + 1, 0), np.minimum(position, last)  # of the windows that hold it
    # Windows with a word: its places in a document one after the other, each with the windows that are new.
    order = np.lexsort((position, words, document))
    again = np.zeros(len(words), bool)
    again[1:] = (np.diff(words[order]) == 0) & (np.diff(document[order]) == 0)
    before = np.where(again, np.append(-1, ends[order][:-1]), -1)
    new = np.maximum(ends[order] - np.maximum(starts[order], before + 1) + 1, 0)
    windows_with = np.bincount(words[order], new, minlength=size)

    shared = scipy.sparse.csr_matrix((size, size))
    for distance in range(1, min(WINDOW, len(words))):
        left = np.flatnonzero(document[:-distance] == document[distance:])
        left = left[words[left] != words[left + distance]]
        low, high = np.sort([words[left], words[left + distance]], axis=0)
        count = ends[left] - starts[left + distance] + 1.0
        kept = count > 0
        shared = shared + scipy.sparse.coo_matrix((count[kept], (low[kept], high[kept])), (size, size)).tocsr()
    shared = shared.tocoo()
    first, second = shared.row, shared.col
    pmi = np.log(shared.data * (last_start + 1).sum() / (windows_with[first] * windows_with[second]))
    near = pmi > 0
    return first[near], second[near], pmi[near]


def _tf_idf(
    words: np.ndarray, document: np.ndarray, documents: int, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents, the words in them, and their TF-IDF; a word of every document has 0 and no edge."""
    pairs, count = np.unique(document.astype(np.int64) * size + words, return_counts=True)
    in_document, word = np.divmod(pairs, size)
    weight = count * np.log(documents / np.bincount(word, minlength=size))[word]
    kept = weight > 0
    return in_document[kept], word[kept], weight[kept]
