import numpy as np
import pytest

from keystore.projection import (
    Plane,
    layer_drift,
    load_balance,
    min_pairwise_distance,
    nearest_neighbours,
)


def test_drift_is_a_fraction_of_the_anchor_and_of_the_radius() -> None:
    anchors = np.array([[3, 4], [0, 2]], np.float32)
    drift = layer_drift(anchors, np.array([[3, 4.5], [0, 2]], np.float32), trust_radius=0.2)
    np.testing.assert_allclose(drift.relative, [0.1, 0])
    assert (drift.moved, drift.max, drift.mean) == (1, pytest.approx(0.5), pytest.approx(0.25))
    assert layer_drift(anchors, anchors, trust_radius=0.0).max == 0


def test_the_closest_pair_and_neighbour_are_found() -> None:
    keys = np.array([[0, 0], [10, 0], [10, 0.001], [0, 5]], np.float32)
    assert min_pairwise_distance(keys) == pytest.approx(0.001)
    nearest, distances = nearest_neighbours(keys, [0, 2])
    assert nearest.tolist() == [3, 1]
    np.testing.assert_allclose(distances, [5, 0.001], rtol=1e-4)


def test_the_plane_shows_where_anchors_differ_most_and_does_not_depend_on_the_keys() -> None:
    generator = np.random.default_rng(0)
    anchors = (generator.normal(size=(40, 6)) * [9, 3, 0.1, 0.1, 0.1, 0.1]).astype(np.float32)
    plane = Plane.of(anchors)
    np.testing.assert_allclose(np.abs(plane.axes[:, :2]), np.eye(2), atol=0.05)
    assert plane.explained > 0.99
    shifted = plane.project(anchors + np.float32([1, 0, 0, 0, 0, 0])) - plane.project(anchors)
    np.testing.assert_allclose(shifted, np.tile([1.0, 0.0], (40, 1)), atol=0.05)
    np.testing.assert_allclose(plane.project(anchors).mean(axis=0), 0, atol=1e-5)
    assert (Plane.of(-anchors).axes == plane.axes).all()


def test_balance_of_uniform_single_and_no_load() -> None:
    uniform, single = load_balance(np.ones(8, np.float32)), load_balance(np.eye(8, dtype=np.float32)[0])
    assert (uniform.entropy_ratio, uniform.jain_index, uniform.imbalance) == pytest.approx((1, 1, 1))
    assert (single.entropy_ratio, single.jain_index, single.imbalance) == pytest.approx((0, 1 / 8, 8))
    assert load_balance(np.zeros(8, np.float32)).imbalance == 1
