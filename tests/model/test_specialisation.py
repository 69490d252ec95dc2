"""Statistics of routing by domain: known cases, nulls, and gates that are those the blocks use."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.blocks.base import ExpertUsage
from model.blocks.mom import MomBlock
from model.training.gates import block_inputs, dense_gates, master_outputs
from model.training.specialisation import (
    gate_shares,
    load_entropy_ratio,
    mean_cosine_similarity,
    mutual_information,
    permutation_test,
    specialisation_index,
)
from model.training.upper import lower_states
from model.transformer import Segment, Variant

DOMAINS, FILES, EXPERTS = 4, 12, 8
LABELS = np.repeat(np.arange(DOMAINS), FILES)
RNG = np.random.default_rng


def independent_mass(seed: int) -> NDArray[np.float64]:
    """Files that differ from each other, but not by domain."""
    return RNG(seed).dirichlet(np.ones(EXPERTS), size=DOMAINS * FILES)


def one_expert_per_domain() -> NDArray[np.float64]:
    mass = np.zeros((DOMAINS * FILES, EXPERTS))
    mass[np.arange(len(LABELS)), LABELS] = 512.0
    return mass


def test_one_expert_per_domain_has_all_the_information_there_is() -> None:
    shares = gate_shares(one_expert_per_domain(), LABELS, DOMAINS)
    assert mutual_information(shares) == pytest.approx(np.log2(DOMAINS))
    assert specialisation_index(shares) == pytest.approx(1.0)
    assert load_entropy_ratio(shares) == pytest.approx(np.log2(DOMAINS) / np.log2(EXPERTS))


def test_the_same_mixture_everywhere_has_none() -> None:
    shares = gate_shares(np.tile(RNG(0).dirichlet(np.ones(EXPERTS)), (len(LABELS), 1)), LABELS, DOMAINS)
    assert mutual_information(shares) == pytest.approx(0, abs=1e-12)
    assert specialisation_index(shares) == pytest.approx(0, abs=1e-12)


def test_two_domains_that_share_half_of_their_experts() -> None:
    shares = np.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
    assert mutual_information(shares) == pytest.approx(0.5)
    assert specialisation_index(shares) == pytest.approx(2 / 3)


def test_evenly_loaded_experts_have_load_entropy_ratio_one() -> None:
    assert load_entropy_ratio(np.full((DOMAINS, EXPERTS), 1 / EXPERTS)) == pytest.approx(1.0)


def test_independent_routing_is_about_its_null_and_real_routing_far_above() -> None:
    chance = permutation_test(mutual_information, independent_mass(0), LABELS, DOMAINS, 400)
    assert chance.observed == pytest.approx(chance.null_mean, rel=0.5)
    assert chance.observed > 0  # the plug-in estimate is biased, which is why there is a null
    real = permutation_test(mutual_information, one_expert_per_domain(), LABELS, DOMAINS, 400)
    assert real.p_value == pytest.approx(1 / 401)
    assert real.observed > real.null_95 > real.null_mean


def test_p_values_of_independent_routing_are_uniform() -> None:
    p_values = [
        permutation_test(mutual_information, independent_mass(seed), LABELS, DOMAINS, 99, seed).p_value
        for seed in range(200)
    ]
    for level in (0.1, 0.25, 0.5, 0.75):
        assert np.mean(np.array(p_values) <= level) == pytest.approx(level, abs=0.11)  # three sigma


def test_a_statistic_that_cannot_change_has_p_value_one() -> None:
    mass = np.tile(RNG(0).dirichlet(np.ones(EXPERTS)), (len(LABELS), 1))
    assert permutation_test(mutual_information, mass, LABELS, DOMAINS, 50).p_value == 1.0


@pytest.mark.parametrize("statistic", [mutual_information, specialisation_index, load_entropy_ratio])
def test_order_of_experts_domains_and_files_does_not_matter(statistic: Callable[[Any], Any]) -> None:
    mass, rng = independent_mass(3), RNG(4)
    expected = statistic(gate_shares(mass, LABELS, DOMAINS))
    files, experts = rng.permutation(len(LABELS)), rng.permutation(EXPERTS)
    renamed = rng.permutation(DOMAINS)[LABELS]
    assert statistic(gate_shares(mass[files][:, experts], renamed[files], DOMAINS)) == pytest.approx(expected)
    assert statistic(gate_shares(3.0 * mass, LABELS, DOMAINS)) == pytest.approx(expected)


def test_an_unused_expert_changes_neither_information_nor_index() -> None:
    shares = gate_shares(independent_mass(5), LABELS, DOMAINS)
    wider = np.concatenate((shares, np.zeros((DOMAINS, 1))), axis=1)
    assert mutual_information(wider) == pytest.approx(mutual_information(shares))
    assert specialisation_index(wider) == pytest.approx(specialisation_index(shares))


def test_a_domain_with_more_files_weighs_no_more() -> None:
    mass, labels = one_expert_per_domain(), LABELS
    more = np.concatenate((mass, mass[:FILES])), np.concatenate((labels, labels[:FILES]))
    assert mutual_information(gate_shares(*more, DOMAINS)) == pytest.approx(np.log2(DOMAINS))


def test_cosine_similarity_knows_equal_opposite_and_unrelated_and_no_lengths() -> None:
    outputs = RNG(0).normal(size=(50, 1, 16))
    other = np.stack((outputs[:, 0], 7 * outputs[:, 0], -outputs[:, 0], np.roll(outputs[:, 0], 1, 0)), axis=1)
    similarity = mean_cosine_similarity(other)
    np.testing.assert_allclose(np.diag(similarity), 1)
    np.testing.assert_allclose(similarity, similarity.T)
    assert similarity[0, 1] == pytest.approx(1)
    assert similarity[0, 2] == pytest.approx(-1)
    assert abs(similarity[0, 3]) < 0.15


@pytest.mark.parametrize("name", ["some", "moe", "mom", "mom-flow-attention", "fm-moe"])
def test_dense_gates_are_those_that_serving_routes_by(make_tiny: Callable[..., Any], name: str) -> None:
    tiny = make_tiny(torch.float32, name)
    tokens = [3 + i * 7 % 90 for i in range(24)]
    config = next(iter(tiny.blocks.values())).config
    usage = ExpertUsage.of(config)
    tiny.model.step([Segment(tokens, 0, tiny.cache(), Variant(tiny.blocks, usage), tiny.keys)])
    with torch.no_grad():
        first = min(tiny.blocks)
        hidden = lower_states(tiny.model, torch.tensor([tokens]), first)
        for row, (layer, at) in enumerate(block_inputs(tiny.model, tiny.blocks, hidden, first)):
            gates = dense_gates(tiny.blocks[layer], tiny.blocks[layer].normed(at))
            assert gates.shape == (1, len(tokens), config.num_experts)
            sums = gates.sum(-1)
            assert torch.all(torch.isclose(sums, torch.ones_like(sums)) | (sums == 0))
            chosen = gates[sums > 0].topk(config.num_experts_per_tok).indices
            counts = torch.bincount(chosen.flatten(), minlength=config.num_experts)
            assert counts.tolist() == usage.counts[0, row].tolist()


def test_master_outputs_under_the_gates_are_what_the_block_mixes(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny(torch.float32, "mom")
    block = tiny.blocks[1]
    assert isinstance(block, MomBlock)
    # No flow, gamma 1 and no bypass leave the gated Masters alone.
    block.config = replace(block.config, bypass_threshold=0.0, routing="soft")
    with torch.no_grad():
        block.gamma.fill_(1.0)
        block.integrate_proj.zero_()
        hidden = torch.randn(2, 10, 32)
        normed = block.normed(hidden)
        mixed = (dense_gates(block, normed).unsqueeze(-1) * master_outputs(block, normed)).sum(2)
        torch.testing.assert_close(mixed, block(hidden)[0])
