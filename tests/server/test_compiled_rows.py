"""Expert blocks within the layers' compiled call: each row finds, gates and adds what it does through `serve`."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from keystore.backends.embedded import EmbeddedBackend
from keystore.errors import NonFiniteQueries
from keystore.records import GravityConfig, ScopeId
from keystore.statistics import RoutingStats, TokenCredit, TokenTrace
from keystore.store import KeyStore
from model.blocks import build_block
from model.blocks.base import BlockSpan, ExpertUsage
from model.blocks.compiled_rows import BlockRows, CompiledRows, Variant, about_blocks
from model.blocks.moe import MoeConfig
from model.blocks.some import SomeConfig
from model.keys import AnchorKeys
from model.native.routed import add_block

LAYER, HIDDEN, EXPERTS, PER_TOKEN, KEY_SIZE = 2, 48, 12, 3, 20
SIZES = {"layers": (LAYER,), "hidden_size": HIDDEN, "num_experts": EXPERTS, "num_experts_per_tok": PER_TOKEN}
SOME = SomeConfig(kind="some", **SIZES, expert_size=8, key_size=KEY_SIZE)
MOE = MoeConfig(kind="moe", **SIZES, expert_size=8)
FORMS = ["silu", "swiglu"]
TENANT, OTHER = ScopeId("tenant", "a"), ScopeId("tenant", "b")
SESSION = ScopeId("session", "a", "talk")


def rounded(block):
    """Frozen, contributing something, and such that bfloat16 can hold it."""
    for parameter in block.requires_grad_(requires_grad=False).parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
        parameter.data = parameter.data.bfloat16().float()
    return block


def block_of(config, **choices):
    torch.manual_seed(5)
    block = rounded(build_block(replace(config, **choices)))
    block.norm += 0.5 * (torch.arange(HIDDEN) % 3)
    return block


def rows_of(count):
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(6))


def window(scope, seed, num_experts):
    rng = np.random.default_rng(seed)
    ids = rng.random((32, num_experts)).argsort(axis=1)[:, :PER_TOKEN]
    queries, weights = rng.standard_normal((32, KEY_SIZE), np.float32), rng.standard_normal(ids.shape)
    credit = TokenCredit(ids, weights.astype(np.float32))
    return RoutingStats.from_tokens(scope, {LAYER: TokenTrace(ids, queries, num_experts, credit)})


@pytest.fixture
def make_store(tmp_path):
    stores = []

    def make(block):
        anchors = {LAYER: block.anchors.numpy()}
        store = KeyStore(
            "tiny", anchors, GravityConfig(plasticity_rate=0.5), EmbeddedBackend(tmp_path / "keys"),
            num_experts_per_tok=PER_TOKEN, plastic_layers=(LAYER,),
        )  # fmt: skip
        stores.append(store)
        return store

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def views_of(make_store):
    """Every kind of version: anchors, overlays of a tenant and a session, and with experts that not everybody sees."""

    def views(block):
        store = make_store(block)
        found = [store.view(ScopeId("anchor"))]
        for seed, scope in enumerate((TENANT, SESSION)):
            assert store.submit(window(scope, seed, EXPERTS))
            store.consolidate_once()
            found.append(store.view(scope))
        for seed, scope in enumerate((TENANT, OTHER)):
            block.experts.append(rounded(build_block(block.config)).experts.stacked)
            keys = np.random.default_rng(seed).standard_normal((EXPERTS, KEY_SIZE), np.float32)
            store.experts.add(f"group-{seed}", scope, {LAYER: keys}, "digest")
        found += [store.view(scope) for scope in (TENANT, SESSION, OTHER, ScopeId("anchor"))]
        assert len({view.checksum for view in found}) >= 5
        ids = found[-2].visible_ids(LAYER).tolist()
        assert ids == [*range(EXPERTS), *range(2 * EXPERTS, 3 * EXPERTS)], "others' experts lie between"
        return found

    return views


def spans_of(views):
    return [
        BlockSpan(i, i + 1, 0, view, None, decode=True, state={}, routed=[]) for i, view in enumerate(views)
    ]


def counted(block):
    usage = ExpertUsage.of(block.config)
    usage.resize({LAYER: block.experts.num_experts})
    return usage


@torch.inference_mode()
def passed(block, rows, views):
    """Rows (T, H) behind their blocks, the ids that were chosen, and what was counted."""
    variant, after, groups = Variant({LAYER: block}, counted(block)), rows.clone(), []
    for i, span in enumerate(spans_of(views)):
        about = about_blocks(variant, span.keys)
        assert about is not None
        groups.append(BlockRows(variant, i, i + 1, True, about, [replace(span, first=0, end=1)]))
    passes = CompiledRows(groups, LAYER + 1, len(rows))
    places, every, choices = passes.table
    assert places.tolist() == [-1] * LAYER + [0]
    for about, row, chosen in zip(every[0], after, choices[0], strict=True):
        add_block(about, row.numpy(), chosen)
    passes.record(groups)
    return after, np.concatenate([group.spans[0].routed[0] for group in groups]), variant.usage.counts


@torch.inference_mode()
def served(block, rows, views):
    usage, spans = counted(block), spans_of(views)
    after = rows + block.serve(rows, LAYER, spans, usage)
    return after, np.concatenate([span.routed[0] for span in spans]), usage.counts


def agrees(block, rows, views):
    found, ids, counts = passed(block, rows, views)
    expected, expected_ids, expected_counts = served(block, rows, views)
    assert (expected - rows).abs().max() > 0.1
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert ids.tolist() == expected_ids.tolist()
    assert (counts == expected_counts).all()
    for i in range(len(rows)):
        alone, _, _ = passed(block, rows[i : i + 1], views[i : i + 1])
        assert torch.equal(alone[0], found[i])
    return ids


@pytest.mark.parametrize("form", FORMS)
def test_each_row_finds_the_experts_of_its_own_version(views_of, form):
    block = block_of(SOME, expert_form=form)
    views = views_of(block)
    rows = rows_of(1).expand(len(views), HIDDEN).contiguous()
    ids = agrees(block, rows, views)
    assert len({tuple(row) for row in ids.tolist()}) > 1
    ids = agrees(block, rows_of(40 * len(views)), views * 40)
    by_view = [set(ids[i :: len(views)].ravel().tolist()) for i in range(len(views))]
    for view, seen in zip(views, by_view, strict=True):
        visible = view.visible_ids(LAYER)
        assert seen <= set(range(EXPERTS) if visible is None else visible.tolist())
    assert max(by_view[3]) >= EXPERTS, "added experts are found by those who see them"
    assert max(by_view[5]) >= 2 * EXPERTS


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_a_router_chooses_and_gates_as_through_serve(form, norm_topk_prob):
    block = block_of(MOE, expert_form=form, norm_topk_prob=norm_topk_prob)
    agrees(block, rows_of(40), [None] * 40)


def test_of_equal_scores_the_lower_ids_are_taken():
    block = block_of(SOME)
    keys = AnchorKeys({LAYER: np.tile(block.anchors[:3].numpy(), (4, 1))})
    ids = agrees(block, rows_of(20), [keys] * 20)
    assert {tuple(row) for row in (ids - ids[:, :1]).tolist()} == {(0, 3, 6)}


def test_experts_that_come_later_are_computed_with_their_own_weights():
    block = block_of(SOME)
    before = AnchorKeys({LAYER: block.anchors.numpy()})
    agrees(block, rows_of(5), [before] * 5)
    block.experts.append(rounded(build_block(SOME)).experts.stacked)
    after = AnchorKeys({LAYER: np.concatenate([block.anchors.numpy(), -block.anchors.numpy()])})
    ids = agrees(block, rows_of(10), [before, after] * 5)
    assert ids[::2].max() < EXPERTS <= ids[1::2].max()


def test_experts_that_are_about_to_come_are_copied_ahead_and_others_once(monkeypatch):
    block, made = block_of(SOME), []
    copied = block.copied
    monkeypatch.setattr(block, "copied", lambda stacked: made.append(stacked) or copied(stacked))
    grown = block.experts.appended(rounded(build_block(SOME)).experts.stacked)
    block.prepare_for(grown)
    assert not made, "nobody uses copies yet"
    before, first = block.experts.stacked, block.compiled_weights()
    block.prepare_for(grown)
    assert block.compiled_weights() is first
    block.experts.adopt(grown)
    second = block.compiled_weights()
    assert second is block.compiled_weights() is not first
    assert [id(stacked) for stacked in made] == [id(before), id(grown)]
    block.experts.adopt(before)
    assert block.compiled_weights().about[:3] != second.about[:3]
    block.experts.append({name: matrix + 1e-5 for name, matrix in grown.items()})
    assert block.compiled_weights() is block.compiled_weights() is None
    assert len(made) == 4, "that there can be none is remembered, too"


def test_a_version_is_looked_up_once_and_again_when_experts_have_come():
    block = block_of(SOME)
    variant, keys = Variant({LAYER: block}, counted(block)), AnchorKeys({LAYER: block.anchors.numpy()})
    known = about_blocks(variant, keys)
    assert about_blocks(variant, keys) is known
    block.experts.append(rounded(build_block(SOME)).experts.stacked)
    assert about_blocks(variant, keys).weights == (block.compiled_weights(),), "nothing keeps the old copies"
    del keys
    assert not variant.seen


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e37])
def test_a_query_that_is_not_finite_is_refused_as_by_a_search(make_store, value):
    block = block_of(SOME)
    rows = rows_of(3)
    if value == 3e37:  # queries are finite, and their scores overflow
        block.norm.data = torch.full((HIDDEN,), value)
        block.anchors *= 1000
    else:
        rows[1, 4] = value
    view = make_store(block).view(ScopeId("anchor"))
    for way in (served, passed):
        with pytest.raises(NonFiniteQueries):
            way(block, rows, [view] * 3)


def test_a_row_that_is_not_finite_leaves_its_neighbours_their_bits():
    block, rows = block_of(MOE), rows_of(3)
    clean, _, _ = passed(block, rows, [None] * 3)
    rows[1, 4] = float("nan")
    strange, _, _ = passed(block, rows, [None] * 3)
    assert strange[1].isnan().all()
    assert torch.equal(strange[::2], clean[::2])


def test_what_compiled_code_cannot_do_goes_through_serve():
    block = block_of(SOME)
    variant = Variant({LAYER: block}, counted(block))
    anchors = AnchorKeys({LAYER: block.anchors.numpy()})
    assert about_blocks(variant, anchors)
    many = AnchorKeys({LAYER: np.zeros((65_537 // KEY_SIZE + 1, KEY_SIZE), np.float32)})
    few = AnchorKeys({LAYER: block.anchors[: PER_TOKEN - 1].numpy()})
    assert [about_blocks(variant, keys) for keys in (many, few)] == [None, None]
    for spoil in (
        lambda other: other.requires_grad_(),
        lambda other: other.experts.up_proj.add_(1e-5),
        lambda other: other.query_proj.add_(1e-5),
        lambda other: other.experts.half(),
    ):
        other = block_of(SOME)
        spoil(other)
        assert about_blocks(Variant({LAYER: other}, counted(other)), anchors) is None
    own = block_of(SOME, query="identity", key_size=HIDDEN)
    assert about_blocks(Variant({LAYER: own}, counted(own)), AnchorKeys({LAYER: own.anchors.numpy()})) is None
