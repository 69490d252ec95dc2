"""Value offsets: the formula, its bound, and that they touch the rows of their own session alone."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from model.blocks.base import BlockSpan
from model.credit import expert_credit, loss_gradient
from model.value_offsets import METRIC_RIDGE, directions, head_metric, moved, pulls, updated

EXPERTS, HIDDEN, SELECTED = 8, 32, 2
TEXT = [(7 * i * i + 3 * i) % 97 for i in range(60)]


def window(tokens, sessions=None):
    """What a window leaves behind: expert ids, gates, gradient, norms of the residual stream."""
    torch.manual_seed(tokens)
    shape = (tokens,) if sessions is None else (sessions, tokens)
    ids = torch.rand(*shape, EXPERTS).topk(SELECTED, dim=-1).indices
    return ids, torch.rand(*shape, SELECTED), torch.randn(*shape, HIDDEN), torch.rand(*shape) + 3


def random_offsets(seed, length=1.0):
    torch.manual_seed(seed)
    return {layer: length * torch.randn(EXPERTS, HIDDEN) for layer in (1, 2)}


def test_a_window_moves_offsets_against_what_its_tokens_ask_for():
    ids, gates, gradient, norms = window(11)
    before = 0.01 * torch.randn(EXPERTS, HIDDEN)
    expected = before.clone()
    for expert in range(EXPERTS):
        mean = torch.zeros(HIDDEN)
        for t in range(11):
            for k in range(SELECTED):
                if ids[t, k] == expert:
                    mean += gates[t, k] * gradient[t] / 11
        expected[expert] -= 0.02 * sorted(norms.tolist())[5] / HIDDEN**0.5 * mean * EXPERTS / SELECTED
    assert_close(updated(before, ids, gates, gradient, norms, 0.02, 10.0), expected)


def test_an_offset_is_never_longer_than_its_bound():
    ids, gates, gradient, norms = window(40)
    offsets = torch.zeros(EXPERTS, HIDDEN)
    for _ in range(200):
        offsets = updated(offsets, ids, gates, gradient, norms, 0.5, 0.1)
    longest = 0.1 * norms.median()
    assert_close(offsets.norm(dim=1), longest.expand(EXPERTS))
    shorter = updated(offsets, ids, gates, gradient, norms / 2, 0.0, 0.1)
    assert_close(shorter, offsets / 2)


def test_sessions_side_by_side_move_as_each_would_alone():
    ids, gates, gradient, norms = window(24, sessions=3)
    before = 0.1 * torch.randn(3, EXPERTS, HIDDEN)
    together = updated(before, ids, gates, gradient, norms, 0.02, 0.1)
    for session in range(3):
        alone = updated(
            before[session], ids[session], gates[session], gradient[session], norms[session], 0.02, 0.1
        )
        assert_close(together[session], alone)


def test_pulls_of_a_windows_pieces_add_up():
    ids, gates, gradient, norms = window(30)
    pieces = [slice(0, 7), slice(7, 8), slice(8, 30)]
    pulled = sum(pulls(ids[rows], gates[rows], gradient[rows], EXPERTS) for rows in pieces)
    whole = updated(torch.zeros(EXPERTS, HIDDEN), ids, gates, gradient, norms, 0.02, 0.1)
    assert_close(moved(torch.zeros(EXPERTS, HIDDEN), pulled, norms, 0.02, 0.1, SELECTED), whole)


def test_one_token_with_a_huge_residual_stream_changes_nothing():
    ids, gates, gradient, norms = window(31)
    norms[norms.argmax()] = 1e5
    usual = updated(torch.zeros(EXPERTS, HIDDEN), *window(31), 0.02, 0.1)
    assert torch.equal(updated(torch.zeros(EXPERTS, HIDDEN), ids, gates, gradient, norms, 0.02, 0.1), usual)


def test_the_metric_undoes_what_the_heads_rows_have_in_common(tiny):
    norm, head = tiny.model.final_norm, tiny.model.head.clone()
    head += 5 * torch.randn(HIDDEN)  # one direction that every logit shares
    metric = head_metric(norm, head)
    weighted = head * norm
    moment = weighted.T @ weighted / len(head)
    ridge = METRIC_RIDGE * moment.trace() / HIDDEN
    assert_close(metric @ (moment + ridge * torch.eye(HIDDEN)), torch.eye(HIDDEN), atol=1e-4, rtol=1e-4)
    common = weighted.mean(0) / weighted.mean(0).norm()
    other = torch.linalg.svd(weighted - weighted.mean(0)).Vh[0]
    assert (metric @ common).norm() < 0.2 * (metric @ other).norm()


def test_directions_are_derivatives_by_the_normalised_state_in_the_metric(tiny):
    torch.manual_seed(2)
    model, final, targets = tiny.model, 7 * torch.randn(6, HIDDEN), torch.randint(0, 97, (6,))
    normed = (final * torch.rsqrt(final.square().mean(-1, keepdim=True))).requires_grad_()
    logits = (normed * model.final_norm) @ model.head.T
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    metric = head_metric(model.final_norm, model.head)
    found = directions(loss_gradient(model, final, targets), final, metric)
    radial = (normed.grad * normed).mean(-1, keepdim=True) * normed  # what the norm cannot pass on
    assert_close(found, (normed.grad - radial).detach() @ metric, atol=1e-5, rtol=1e-3)


def test_serving_adds_what_whole_windows_add(tiny):
    block, offsets = tiny.blocks[1], random_offsets(3)
    hidden = torch.randn(9, HIDDEN)
    span = BlockSpan(0, 9, 0, tiny.keys, None, decode=False, state={}, offsets=offsets)
    served = block.serve(hidden, 1, [span], tiny.variant.usage)
    mixed = block.mix(block.normed(hidden)[None], block.anchors, offsets[1])
    assert_close(served, mixed.combined[0], atol=1e-5, rtol=1e-5)


def test_offsets_of_zero_change_no_bit(tiny):
    zero = {layer: torch.zeros(EXPERTS, HIDDEN) for layer in (1, 2)}
    plain = tiny.model.step([tiny.segment(TEXT)])
    assert torch.equal(tiny.model.step([replace(tiny.segment(TEXT), offsets=zero)]), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decode", [False, True])
def test_a_sequence_has_the_same_bits_alone_and_beside_sessions_with_offsets(make_tiny, dtype, decode):
    tiny = make_tiny(dtype)
    lengths = (9, 30, 17, 1, 9)
    offsets = (None, random_offsets(1), random_offsets(2), None, {2: random_offsets(3)[2]})

    def segments():
        made = [replace(tiny.segment(TEXT[:n]), offsets=o) for n, o in zip(lengths, offsets, strict=True)]
        if not decode:
            return made
        for each in made:
            tiny.model.step([each])
        return [replace(s, token_ids=[5], start=len(s.token_ids), decode=True) for s in made]

    alone = [tiny.model.step([segment]) for segment in segments()]
    together = tiny.model.step(segments())
    for rows, expected in zip(together.split([len(a) for a in alone]), alone, strict=True):
        assert torch.equal(rows, expected)
    plain = tiny.model.step([replace(segments()[1], offsets=None)])
    assert not torch.equal(plain, alone[1])


def test_credit_of_an_expert_counts_its_offset(tiny):
    block, offsets = tiny.blocks[2], random_offsets(4)[2]
    torch.manual_seed(5)
    normed, targets = torch.randn(6, HIDDEN), torch.randint(0, 97, (6,))
    mixture = block.mix(normed[None], block.anchors, offsets)
    gradient = loss_gradient(tiny.model, normed + mixture.combined[0], targets)
    credit = expert_credit(block, block.anchors, mixture.trace, gradient, SELECTED, offsets=offsets)
    scores = mixture.all_scores[0].clone().requires_grad_()
    ids = mixture.trace.expert_ids
    outputs = block.experts(normed, ids) + offsets[ids]
    final = normed + (scores.gather(1, ids).softmax(-1).unsqueeze(-1) * outputs).sum(1)
    rows = torch.nn.functional.rms_norm(final, (HIDDEN,), tiny.model.final_norm, 1e-5)
    torch.nn.functional.cross_entropy(rows @ tiny.model.embedding.T, targets, reduction="sum").backward()
    assert_close(credit.values, -scores.grad.gather(1, credit.expert_ids), atol=1e-5, rtol=1e-4)
