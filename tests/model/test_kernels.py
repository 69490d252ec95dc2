"""What recorded calls compute on a GPU against torch's operations. On a CPU with Triton's interpreter (`make test-kernels`), on a GPU compiled."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from model.attention import rope_table, rotate
from model.blocks.routing import top_k_of_softmax
from model.checkpoints.load import assemble
from model.graphs import decoder
from model.graphs.attention import Places, attend_pooled
from model.graphs.blocks import GraphExperts
from model.graphs.decoder import GraphDecoder
from model.graphs.kv_pool import PooledBudget
from model.graphs.way import IN_TORCH, Way

PLACES = [pytest.param("cpu", marks=pytest.mark.kernels), pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}

pytestmark = pytest.mark.parametrize("device", PLACES)


@pytest.fixture(autouse=True)
def interpreted(device, monkeypatch):
    """Kernels know how they run from the moment of their import: in a process always on the same device."""
    if device != "cpu":
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from triton.language import bfloat16, cumsum, float32
    from triton.runtime import interpreter

    assert isinstance(cumsum, interpreter.InterpretedFunction), "somebody imported triton as a compiler"
    product, patch = interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor

    def of_numbers(builder, a, b, *rest):
        """The interpreter multiplies bfloat16's bits, as if they were whole numbers."""
        a, b = (builder.cast_impl(t, float32) if t.dtype.scalar == bfloat16 else t for t in (a, b))
        return product(builder, a, b, *rest)

    def with_bounds(tensor, scope):
        """The interpreter makes numbers of arrays as numpy 2.4 does no more."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", of_numbers)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", with_bounds)


@pytest.fixture
def normal(device):
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=torch.float32: torch.randn(shape, generator=generator).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 16, 40, 130])
def test_products_with_what_comes_before_and_after_are_those_of_torch(
    device, normal, monkeypatch, rows, dtype
):
    from model.graphs.kernels import products

    def compare(inputs, outputs, *ways):
        hidden, norm = 3 * normal(rows, inputs), normal(inputs)
        weight, bias = (normal(outputs, inputs) * inputs**-0.5).to(dtype), normal(outputs, dtype=dtype)
        residual = normal(rows, outputs)
        kinds = {
            "alone": lambda: products.product(hidden.to(dtype), weight),
            "normed": lambda: products.product(hidden, weight, norm=(norm, 1e-5), bias=bias),
            "gated": lambda: products.product(hidden, weight, norm=(norm, 1e-5), gated=True),
            "added": lambda: products.product(hidden.to(dtype), weight, bias=bias, add_to=residual.clone()),
        }
        for way in ways or kinds:
            results = []
            for most in (256, 0):  # kernels, torch
                monkeypatch.setattr(products, "MOST_ROWS", most)
                results.append(kinds[way]())
            assert_close(*results, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])

    compare(150, 44)
    if device == "cuda" and dtype == torch.bfloat16:  # the base model's
        compare(576, 960, "normed")
        compare(576, 3072, "gated")
        compare(1536, 576, "added")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_logits_are_not_rounded(device, normal, tiny, random_weights, monkeypatch, rows, dtype):
    from model.graphs.kernels import layers

    monkeypatch.setattr("model.graphs.kernels.products.MANY_OUTPUTS", 64)
    config = tiny.model.config
    weights = {name: weight.to(device) for name, weight in random_weights(config, dtype).items()}
    model = assemble(config, weights)
    hidden = 3 * normal(rows, config.hidden_size)
    normed = torch.nn.functional.rms_norm(hidden, hidden.shape[1:], model.final_norm, config.rms_norm_eps)
    logits = layers.logits(model, hidden)
    assert_close(logits, normed @ model.head.float().T, atol=1e-4, rtol=1e-4)


def attend_unrotated(qkv, rope, positions, first_blocks, keys, values, length, config):
    """`attend_pooled` with what comes before it, as the kernel takes it."""
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    query, key, value = qkv.unflatten(1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = (table[positions].unsqueeze(1) for table in rope)
    places = Places.of(positions, first_blocks, length, qkv.dtype)
    return attend_pooled(rotate(query, cos, sin), rotate(key, cos, sin), value, keys, values, places)


@pytest.mark.parametrize(
    ("sizes", "splits", "dtype"),
    [
        ((4, 2, 8), 1, torch.float32),
        ((4, 2, 8), 8, torch.bfloat16),
        ((9, 3, 64), 1, torch.bfloat16),
        ((9, 3, 64), 2, torch.float32),
    ],
)
def test_attention_reads_and_writes_each_rows_own_part_of_the_pool(
    device, normal, tiny, monkeypatch, splits, dtype, sizes
):
    from model.graphs.kernels import attention

    heads, kv_heads, dim = sizes
    monkeypatch.setattr(attention, "splits_of", lambda programs, length: splits)
    config = replace(
        tiny.model.config,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        max_position_embeddings=512,
    )
    at = [0, 1, 63, 64, 65, 130, 511, 0]
    pool = PooledBudget(config, 1 << 13, dtype, torch.device(device))
    for kept in (pool.keys, pool.values):
        kept.copy_(normal(*kept.shape))
    first = [pool.reserve(position + 1).first for position in at[:-1]] + [0]
    for kept in (pool.keys, pool.values):
        kept.copy_(normal(*kept.shape))
    positions, first_blocks = torch.tensor([at, first], device=device)
    qkv = normal(len(at), (heads + 2 * kv_heads) * dim, dtype=dtype)
    rope = rope_table(config, torch.device(device))

    expected_keys, expected_values = pool.keys[0].clone(), pool.values[0].clone()
    given = qkv, rope, positions, first_blocks
    expected = attend_unrotated(*given, expected_keys, expected_values, 512, config)
    for kept in (pool.keys, pool.values):  # whatever a former owner left behind the rows' positions
        for position, block in zip(at[:-1], first[:-1], strict=True):
            end = block + position // 64
            kept[0, end, position % 64 :] = torch.nan
    attended = attention.attend(*given, pool.keys[0], pool.values[0], 512, config)
    assert_close(attended, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    for kept, written in ((pool.keys[0], expected_keys), (pool.values[0], expected_values)):
        for position, block in zip(at, first, strict=True):
            place = block + position // 64, position % 64
            assert_close(kept[place], written[place], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_few_rows_of_long_texts_are_split_and_many_rows_are_not(device):
    from model.graphs.kernels.attention import splits_of

    assert [splits_of(3 * rows, 512) for rows in (1, 256)] == [1, 1]
    assert [splits_of(3 * rows, 8192) for rows in (1, 8, 64, 256)] == [16, 16, 2, 1]


@pytest.mark.parametrize("renormalize", [True, False])
def test_the_best_scores_are_chosen_with_their_gates(device, normal, renormalize):
    from model.graphs.kernels.routing import choose

    logits = normal(6, 11)
    expert_ids = torch.zeros(6, 5, dtype=torch.int64, device=device)
    gates = choose(logits, expert_ids[:, 1:4], None, renormalize=renormalize)
    expected_gates, expected = top_k_of_softmax(logits, 3, renormalize=renormalize)
    assert_close(gates, expected_gates)
    assert torch.equal(expert_ids[:, 1:4], expected)
    assert not expert_ids[:, [0, 4]].any()


@pytest.mark.parametrize(("experts", "size"), [(11, 24), (1000, 20)])
def test_queries_are_scored_by_the_keys_of_their_slot_that_are_shown(device, normal, experts, size):
    from model.graphs.kernels.routing import choose

    queries, keys, shown = normal(6, size), normal(4, experts, size), torch.zeros(4, experts, device=device)
    shown[1, ::2] = -torch.inf
    slots = torch.tensor([[0, 1, 2, 3, 1, 1], [9] * 6], device=device).T[:, 0]
    expert_ids = torch.empty(6, 3, dtype=torch.int64, device=device)
    gates = choose(queries, expert_ids, (keys, shown, slots))
    scores = (keys[slots] @ queries.unsqueeze(-1)).squeeze(-1) + shown[slots]
    best, expected = scores.topk(3)
    assert torch.equal(expert_ids, expected)
    assert_close(gates, best.softmax(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["some", "moe"])
def test_selected_experts_are_added_to_the_rows_that_are_their_own(device, normal, make_tiny, kind):
    from model.graphs.kernels.experts import add_selected

    block = make_tiny(torch.float32, kind).blocks[1].to(device)
    experts = GraphExperts(block.experts)
    hidden = normal(5, 32)
    expert_ids = torch.tensor([[0, 7], [3, 2], [7, 1], [7, 6], [4, 5]], device=device)
    gates, own = normal(5, 2).softmax(-1), torch.tensor([1, 1, 0, 1, 0], device=device).bool()
    expected = hidden + experts.mix(block.normed(hidden), expert_ids, gates) * own.unsqueeze(1)
    add_selected(
        hidden, (block.norm, block.config.rms_norm_eps), experts.inner, experts.last, expert_ids, gates, own
    )
    assert_close(hidden, expected, atol=1e-4, rtol=1e-4)


def test_whole_layers_are_those_of_torch(device, make_tiny, random_weights, monkeypatch):
    from model.graphs.kernels import layers

    tinies = [make_tiny(torch.float32, kind) for kind in ("some", "moe")]
    config = tinies[0].model.config
    weights = {name: weight.to(device) for name, weight in random_weights(config, torch.float32).items()}
    for tiny in tinies:
        for block in tiny.blocks.values():
            block.to(device)
    rows = []
    for way in (IN_TORCH, Way(layers.run_layers, layers.logits)):
        monkeypatch.setattr(decoder, "way_on", lambda device, way=way: way)
        model = assemble(config, weights)
        model.graphs = GraphDecoder(model)
        budget = model.cache_budget(1 << 12)
        segments = [
            decoder.Segment([5 * i + 1], 0, budget.reserve(64), variant, keys, decode=True, routed=[])
            for i, (variant, keys) in enumerate([(None, None), *[(t.variant, t.keys) for t in tinies]])
        ]
        for step in range(4):
            segments = [replace(s, token_ids=[7 * step + i], start=step) for i, s in enumerate(segments)]
            rows.append((model.step(segments), [s.routed for s in segments]))
    for (expected, expected_ids), (hidden, expert_ids) in zip(rows[:4], rows[4:], strict=True):
        assert_close(hidden, expected, atol=1e-4, rtol=1e-4)
        for mine, others in zip(expert_ids, expected_ids, strict=True):
            assert [ids.tolist() for ids in mine] == [ids.tolist() for ids in others]
