import jax
import jax.numpy as jnp
import numpy as np

from dpa_jax.data import augment


def erased(p, shape=(32, 24, 3), draws=4000, **options):
    """Where values were replaced, and by what: bool [N, H, W] and float [N, H, W, C]."""
    image = jnp.full(shape, 99.0)
    run = jax.jit(jax.vmap(lambda key: augment.random_erasing(key, image, p, **options)))
    values = np.asarray(run(jax.random.split(jax.random.key(0), draws)))
    where = values != 99
    assert (where.all(-1) == where.any(-1)).all()
    return where[..., 0], values


def test_one_rectangle_of_noise_with_the_right_chance():
    where, values = erased(0.25)
    hit = where.any(axis=(1, 2))
    assert abs(hit.mean() - 0.25) < 0.025
    for mask in where[hit][:200]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask.sum() == len(rows) * len(columns) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    noise = values[where]
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    # Every pixel and channel has its own draw.
    first = values[hit][0][where[hit][0]]
    assert len(np.unique(first)) == first.size
    assert not erased(0.0, draws=50)[0].any()


def test_areas_proportions_and_places_are_drawn_as_published():
    """Against the published algorithm written plainly, in distribution."""
    height, width = 32, 24
    where, _ = erased(1.0)
    assert where.any(axis=(1, 2)).all()
    ours = np.array(
        [(m.any(1).argmax(), m.any(0).argmax(), m.any(1).sum(), m.any(0).sum()) for m in where],
        float,
    )
    random = np.random.default_rng(0)

    def plain():
        while True:
            area = random.uniform(0.02, 1 / 3) * height * width
            aspect = np.exp(random.uniform(np.log(0.3), np.log(1 / 0.3)))
            h, w = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if h < height and w < width:
                return random.integers(0, height - h + 1), random.integers(0, width - w + 1), h, w

    theirs = np.array([plain() for _ in range(len(ours))], float)
    for columns in [(0,), (1,), (2,), (3,), (2, 3), (0, 2), (1, 3), (2, 2)]:
        one, other = (boxes[:, columns].prod(1) for boxes in (ours, theirs))
        error = np.hypot(one.std(), other.std()) / np.sqrt(len(ours))
        assert abs(one.mean() - other.mean()) < 4 * error, columns


def test_nothing_is_erased_where_no_rectangle_fits():
    assert not erased(1.0, shape=(4, 4, 1), draws=50, scale=(0.9, 1.0), ratio=(8.0, 9.0))[0].any()
