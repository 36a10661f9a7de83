"""timm's and torchvision's models with the same weights have the same logits. Needs the extra `peers`."""

import numpy as np
import pytest

pytest.importorskip("timm")
pytest.importorskip("torchvision")

from benchmarks.peers import PEERS, both, difference


@pytest.mark.parametrize("name", PEERS)
def test_logits_of_the_same_weights_are_the_peers(name):
    images = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)
    ours, theirs = (forward(images) for forward in both(name))
    assert np.ptp(theirs) > 1e-3  # there is something to compare
    assert difference(ours, theirs) < 1e-4
