"""Every family of checkpoints against transformers on the same tiny folder, and as plastic blocks."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from model.blocks.base import ExpertUsage, LayerTrace, RoutingTrace
from model.blocks.routed_ffn import RoutedFfnBlock, RoutedFfnConfig
from model.checkpoints.load import load_checkpoint
from model.credit import expert_credit
from model.errors import UnsupportedConfig
from model.keys import AnchorKeys
from model.kv_cache import CacheBudget
from model.plastic_pass import PlasticPass
from model.transformer import Segment, Variant

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, scaled positions": ("llama", {"rope_parameters": LLAMA3}),
    "llama, wide heads": ("llama", {"head_dim": 32}),
    "llama, sharded": ("llama", {"shard_size": "100KB"}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3, biases": ("qwen3", {"attention_bias": True}),
    "mixtral": ("mixtral", {}),
    "mixtral, sharded": ("mixtral", {"shard_size": "100KB"}),
    "olmoe": ("olmoe", {}),
    "olmoe, gates sum to 1": ("olmoe", {"norm_topk_prob": True}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe, no qkv biases": ("qwen2_moe", {"qkv_bias": False}),
    "qwen2_moe, every second layer": ("qwen2_moe", {"decoder_sparse_step": 2, "norm_topk_prob": True}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe, a dense layer": ("qwen3_moe", {"mlp_only_layers": [1], "norm_topk_prob": True}),
    "qwen3_moe, tied": ("qwen3_moe", {"tie_word_embeddings": True}),
}
ROUTED = [name for name, (family, _) in CASES.items() if "moe" in family or family == "mixtral"]
TEXT = [(7 * i * i + 3 * i + 5) % 512 for i in range(100)]


class Loaded:
    """A checkpoint in memory, and a short way to run text through it."""

    def __init__(self, folder, dtype=torch.float32):
        self.base = load_checkpoint(folder, dtype, folder / "unused")
        self.model, self.blocks = self.base.transformer, self.base.blocks
        self.variant = self.keys = None
        if self.blocks:
            config = next(iter(self.blocks.values())).config
            self.variant = Variant(self.blocks, ExpertUsage.of(config))
            self.keys = AnchorKeys({layer: block.anchors.numpy() for layer, block in self.blocks.items()})

    def segment(self, tokens):
        cache = CacheBudget(self.model.config, 128, self.model.dtype, self.model.device).reserve(128)
        return Segment(tokens, 0, cache, self.variant, self.keys)

    def logits(self, tokens):
        return self.model.logits(self.model.step([self.segment(tokens)]))


@pytest.fixture(params=CASES)
def case(request, checkpoint):
    """A tiny folder of every case in turn, with transformers' model of it."""
    family, changes = CASES[request.param]
    return checkpoint(family, **changes)


@pytest.fixture(params=ROUTED)
def routed(request, checkpoint):
    family, changes = CASES[request.param]
    return checkpoint(family, **changes)[0]


def test_logits_are_those_of_transformers(case):
    folder, reference = case
    with torch.inference_mode():
        expected = reference(torch.tensor([TEXT])).logits[0]
    assert expected.std() > 0.5  # nothing that a model of zeros would meet
    assert_close(Loaded(folder).logits(TEXT), expected, atol=1e-4, rtol=0)


def test_decoding_token_by_token_gives_the_logits_of_transformers(case):
    folder, reference = case
    loaded = Loaded(folder)
    segment = loaded.segment(TEXT)
    rows = [loaded.model.step([replace(segment, token_ids=TEXT[:90])])]
    rows += [
        loaded.model.step([replace(segment, token_ids=[TEXT[i]], start=i, decode=True)])
        for i in range(90, 100)
    ]
    with torch.inference_mode():
        expected = reference(torch.tensor([TEXT])).logits[0]
    assert_close(loaded.model.logits(torch.cat(rows)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_has_the_same_bits_alone_and_beside_others(routed, dtype):
    loaded = Loaded(routed, dtype)
    texts = [TEXT[:9], TEXT[20:50], TEXT[60:77], TEXT[90:91]]
    alone = [loaded.model.step([loaded.segment(text)]) for text in texts]
    together = loaded.model.step([loaded.segment(text) for text in texts])
    for rows, expected in zip(together.split([len(text) for text in texts]), alone, strict=True):
        assert torch.equal(rows, expected)


def test_in_bfloat16_experts_stay_in_bfloat16_and_routing_in_float32(routed):
    blocks = Loaded(routed, torch.bfloat16).blocks
    for block in blocks.values():
        assert {p.dtype for p in block.experts.parameters()} == {torch.bfloat16}
        assert block.anchors.dtype == block.norm.dtype == torch.float32
        assert not any(p.requires_grad for p in block.parameters())


def test_a_context_longer_than_the_sliding_window_is_not_served(checkpoint):
    assert Loaded(checkpoint("mistral")[0]).model.config.max_position_embeddings == 256
    unused = checkpoint("qwen2", use_sliding_window=False, sliding_window=128)[0]
    assert Loaded(unused).model.config.max_position_embeddings == 512
    used = checkpoint("qwen2", use_sliding_window=True, sliding_window=128, max_window_layers=1)[0]
    assert Loaded(used).model.config.max_position_embeddings == 128


def test_within_its_window_a_sliding_model_is_exact(checkpoint):
    folder, reference = checkpoint("mistral", sliding_window=100)
    with torch.inference_mode():
        expected = reference(torch.tensor([TEXT])).logits[0]
    assert_close(Loaded(folder).logits(TEXT), expected, atol=1e-4, rtol=0)


def test_forced_experts_are_followed_with_their_own_gates(routed):
    loaded = Loaded(routed)
    taken: list = []
    free = loaded.model.step([replace(loaded.segment(TEXT), routed=taken)])
    forced = {layer: torch.from_numpy(ids) for layer, ids in zip(sorted(loaded.blocks), taken, strict=True)}
    assert torch.equal(loaded.model.step([replace(loaded.segment(TEXT), forced=forced)]), free)
    others = {layer: (ids + 1) % 8 for layer, ids in forced.items()}
    again: list = []
    moved = loaded.model.step([replace(loaded.segment(TEXT), forced=others, routed=again)])
    assert all((ids == others[layer].numpy()).all() for layer, ids in zip(sorted(others), again, strict=True))
    assert not torch.allclose(moved, free)


def test_the_plastic_pass_has_the_losses_of_serving(routed):
    loaded = Loaded(routed)
    layers = frozenset(sorted(loaded.blocks)[-1:])
    trace = RoutingTrace(layers)
    hidden = loaded.model.step([replace(loaded.segment(TEXT[:-1]), trace=trace)])
    targets = torch.tensor(TEXT[1:])
    expected = F.cross_entropy(loaded.model.logits(hidden), targets, reduction="none")
    keys = {layer: block.anchors for layer, block in loaded.blocks.items()}
    result = PlasticPass(loaded.model, loaded.blocks, layers).run(
        trace.entry[None].clone(), targets[None], keys, credit="gradient"
    )
    assert_close(result.losses[0], expected, atol=1e-4, rtol=1e-4)


def block_of(*, norm_topk_prob):
    torch.manual_seed(0)
    config = RoutedFfnConfig(
        kind="routed-ffn", layers=(0,), hidden_size=16, num_experts=6, num_experts_per_tok=2, expert_size=8,
        key_size=16, query="identity", expert_form="swiglu", norm_topk_prob=norm_topk_prob, shared_size=8,
    )  # fmt: skip
    block = RoutedFfnBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return block.requires_grad_(requires_grad=False)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_credit_is_minus_the_derivative_by_the_score_beside_the_selected(norm_topk_prob):
    """For every expert of every token: it is mixed in, if it is not, and its score differentiated."""
    block = block_of(norm_topk_prob=norm_topk_prob)
    normed, gradient = torch.randn(5, 16), torch.randn(5, 16)
    mixture = block.mix(normed[None], block.anchors)
    trace: LayerTrace = mixture.trace
    credit = expert_credit(block, block.anchors, trace, gradient, 0)
    for token in range(5):
        for expert_id, value in zip(credit.expert_ids[token].tolist(), credit.values[token], strict=True):
            joined = dict.fromkeys([*trace.expert_ids[token].tolist(), expert_id])
            scores = mixture.all_scores[0, token].clone().requires_grad_()
            gates = (
                scores.softmax(-1)[list(joined)] if not norm_topk_prob else scores[list(joined)].softmax(-1)
            )
            outputs = block.experts(normed[token : token + 1], torch.tensor([list(joined)]))[0]
            loss = (gates.unsqueeze(-1) * outputs).sum(0) @ gradient[token]
            (derivative,) = torch.autograd.grad(loss, scores)
            assert_close(value, -derivative[expert_id], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_experts_that_a_scope_does_not_see_take_no_part_in_its_gates(norm_topk_prob):
    block = block_of(norm_topk_prob=norm_topk_prob)
    normed, few = torch.randn(1, 5, 16), torch.tensor([0, 1, 3, 4])
    chosen = (normed @ block.anchors[few].T).topk(2, dim=-1).indices
    mixture = block.mix(normed, block.anchors, forced=few[chosen], visible_ids=few)
    scores = normed @ block.anchors[few].T
    gates = scores.gather(-1, chosen).softmax(-1) if norm_topk_prob else scores.softmax(-1).gather(-1, chosen)
    assert_close(mixture.trace.gates, gates[0])


def test_blocks_that_share_weights_grow_apart(checkpoint):
    block = Loaded(checkpoint("olmoe")[0]).blocks[1]
    other = block.sharing()
    assert other.experts.stacked["down_proj"].data_ptr() == block.experts.stacked["down_proj"].data_ptr()
    other.experts.append({name: torch.ones(1, *m.shape[1:]) for name, m in other.experts.stacked.items()})
    assert (other.experts.num_experts, block.experts.num_experts) == (9, 8)


def test_a_width_at_which_bits_would_depend_on_neighbours_is_refused():
    config = replace(block_of(norm_topk_prob=True).config, expert_size=12)
    with pytest.raises(UnsupportedConfig, match="expert_size is 12; allowed: multiples of 8"):
        RoutedFfnBlock(config)
