import numpy as np
import pytest

from keystore.errors import NonFiniteQueries
from keystore.index import KeyIndex

SIZES = [(5, 3), (64, 24), (64, 577), (1024, 96), (6000, 64)]


def gaussian(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dim), dtype=np.float32)


@pytest.mark.parametrize(("num_keys", "dim"), SIZES)
def test_a_query_finds_the_same_bits_alone_and_in_any_batch(num_keys: int, dim: int) -> None:
    index, queries = KeyIndex(gaussian(num_keys, dim)), gaussian(150, dim, seed=1)
    k = min(4, num_keys)
    scores, ids = index.search(queries, k)
    for batch in (1, 3, 7, 8, 20, 149):
        some_scores, some_ids = index.search(queries[:batch], k)
        np.testing.assert_array_equal(some_scores.view(np.uint32), scores[:batch].view(np.uint32))
        np.testing.assert_array_equal(some_ids, ids[:batch])


@pytest.mark.parametrize(("num_keys", "dim"), SIZES)
def test_search_equals_a_full_sort(num_keys: int, dim: int) -> None:
    keys, queries = gaussian(num_keys, dim), gaussian(40, dim, seed=2)
    k = min(4, num_keys)
    scores, ids = KeyIndex(keys).search(queries, k)
    exact = queries.astype(np.float64) @ keys.T.astype(np.float64)
    np.testing.assert_array_equal(ids, np.argsort(-exact, axis=1, kind="stable")[:, :k])
    np.testing.assert_allclose(scores, np.take_along_axis(exact, ids, axis=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 100])
def test_equal_scores_go_to_the_lower_id_however_many_tie(batch: int) -> None:
    keys = np.tile(gaussian(1, 16), (300, 1))
    keys[200] *= 2 if (gaussian(1, 16, 3) @ keys[0])[0] > 0 else -2
    _, ids = KeyIndex(keys).search(np.tile(gaussian(1, 16, seed=3), (batch, 1)), 4)
    np.testing.assert_array_equal(ids, np.tile([200, 0, 1, 2], (batch, 1)))


@pytest.mark.parametrize("batch", [1, 100])
def test_keys_closer_than_rounding_are_ranked_the_same_in_every_batch(batch: int) -> None:
    keys = np.tile(gaussian(1, 64), (500, 1))
    keys += (np.random.default_rng(4).integers(-2, 3, keys.shape) * np.spacing(keys)).astype(np.float32)
    queries = gaussian(100, 64, seed=5)
    index = KeyIndex(keys)
    scores, ids = index.search(queries, 4)
    for row in range(0, 100, batch):
        alone = index.search(queries[row : row + batch], 4)
        np.testing.assert_array_equal(alone[0], scores[row : row + batch])
        np.testing.assert_array_equal(alone[1], ids[row : row + batch])


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("batch", [1, 50])
def test_a_query_that_is_not_finite_is_an_error(poison: float, batch: int) -> None:
    queries = gaussian(batch, 24)
    queries[-1] = poison
    with pytest.raises(NonFiniteQueries):
        KeyIndex(gaussian(64, 24) * 100).search(queries, 4)
