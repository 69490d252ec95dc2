"""Top-k experts against transformers' Mixtral and OLMoE, and against SOME with nothing plastic about it."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeSparseMoeBlock

from model.blocks.base import BlockSpan, ExpertUsage
from model.blocks.experts import SwigluExperts
from model.blocks.moe import MoeBlock, MoeConfig
from model.blocks.routing import switch_auxiliary_loss, top_k_of_softmax
from model.blocks.some import SomeBlock, SomeConfig
from model.keys import AnchorKeys

EXPERTS, PER_TOKEN, HIDDEN, WIDTH = 8, 3, 32, 16
CONFIG = MoeConfig(
    kind="moe",
    layers=(0,),
    hidden_size=HIDDEN,
    num_experts=EXPERTS,
    num_experts_per_tok=PER_TOKEN,
    expert_size=WIDTH,
)


def random_block(config=CONFIG, block=MoeBlock):
    torch.manual_seed(4)
    built = block(config).requires_grad_(requires_grad=False)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return built


def one_span(rows, keys=None):
    return [BlockSpan(0, rows, 0, keys, None, decode=False, state={})]


def reference_config(config_type, **more):
    return config_type(
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_experts_per_tok=PER_TOKEN,
        attn_implementation="eager",
        experts_implementation="eager",
        **more,
    )


REFERENCES = {
    "mixtral": (
        lambda: MixtralSparseMoeBlock(reference_config(MixtralConfig, num_local_experts=EXPERTS)),
        True,
    ),
    "olmoe": (lambda: olmoe(norm_topk_prob=False), False),
    "olmoe-normalised": (lambda: olmoe(norm_topk_prob=True), True),
}


def olmoe(*, norm_topk_prob):
    return OlmoeSparseMoeBlock(
        reference_config(OlmoeConfig, num_experts=EXPERTS, norm_topk_prob=norm_topk_prob)
    )


@pytest.mark.parametrize("name", REFERENCES)
def test_outputs_and_choices_are_those_of_transformers(name):
    build, norm_topk_prob = REFERENCES[name]
    reference = build().eval()
    block = random_block(replace(CONFIG, norm_topk_prob=norm_topk_prob))
    with torch.no_grad():
        reference.gate.weight.copy_(block.router)
        gate_up = torch.cat((block.experts.gate_proj, block.experts.up_proj), dim=1)
        reference.experts.gate_up_proj.copy_(gate_up)
        reference.experts.down_proj.copy_(block.experts.down_proj)
        hidden = torch.randn(2, 13, HIDDEN)
        normed = block.normed(hidden)
        expected = reference(normed)
        _, gates, expert_ids = reference.gate(normed)
    assert_close(block(hidden)[0], expected, atol=1e-5, rtol=0)
    rows = hidden.flatten(0, 1)
    usage = ExpertUsage.of(CONFIG)
    served = block.serve(rows, 0, one_span(26), usage)
    assert_close(served, expected.flatten(0, 1), atol=1e-5, rtol=0)
    logits = block.normed(rows) @ block.router.T
    my_gates, my_ids = top_k_of_softmax(logits, PER_TOKEN, renormalize=norm_topk_prob)
    assert torch.equal(my_ids, expert_ids)
    assert_close(my_gates, gates, atol=1e-6, rtol=0)
    assert usage.counts[0, 0].tolist() == expert_ids.flatten().bincount(minlength=EXPERTS).tolist()


@pytest.mark.parametrize("form", ["swiglu", "silu"])
def test_some_with_identity_queries_and_the_routers_rows_as_keys_is_this_moe(form):
    moe = random_block(replace(CONFIG, expert_form=form))
    some_config = SomeConfig(
        kind="some",
        layers=(0,),
        hidden_size=HIDDEN,
        num_experts=EXPERTS,
        num_experts_per_tok=PER_TOKEN,
        expert_size=WIDTH,
        key_size=HIDDEN,
        query="identity",
        expert_form=form,
    )
    some = random_block(some_config, SomeBlock)
    some.norm.copy_(moe.norm)
    some.anchors.copy_(moe.router)
    some.experts.load_state_dict(moe.experts.state_dict())
    hidden = torch.randn(1, 21, HIDDEN)
    (mine, my_loss), (theirs, their_loss) = some(hidden), moe(hidden)
    assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
    assert_close(my_loss, their_loss, atol=1e-6, rtol=1e-5)
    mine, theirs = (
        block.serve(hidden[0], 0, one_span(21, AnchorKeys({0: moe.router.numpy()})), ExpertUsage.of(CONFIG))
        for block in (some, moe)
    )
    assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_only_selected_experts_execute_and_only_on_their_rows(monkeypatch):
    block = random_block()
    executed = {}
    original = SwigluExperts.run

    def counting(rows, *matrices):
        first = [matrix.data_ptr() for matrix in block.experts.gate_proj]
        expert = first.index(matrices[0].data_ptr())
        assert expert not in executed, "an expert runs once, over all of its rows"
        executed[expert] = int(rows.any(dim=1).sum())  # rows that fill up are zero
        return original(rows, *matrices)

    monkeypatch.setattr(SwigluExperts, "run", staticmethod(counting))
    hidden = torch.randn(6, HIDDEN)
    block.router[5:] = -10 * block.normed(hidden).mean(0)  # nobody wants the last three
    block.serve(hidden, 0, one_span(6), ExpertUsage.of(CONFIG))
    _, expert_ids = top_k_of_softmax(block.normed(hidden) @ block.router.T, PER_TOKEN)
    wanted = expert_ids.flatten().bincount(minlength=EXPERTS)
    assert executed == {e: int(n) for e, n in enumerate(wanted) if n}
    assert len(executed) < EXPERTS


def test_the_auxiliary_loss_is_switchs_with_a_router_z_loss():
    torch.manual_seed(2)
    logits = torch.randn(17, EXPERTS) * 2
    _, expert_ids = top_k_of_softmax(logits, PER_TOKEN)
    balance = 0.0
    for expert in range(EXPERTS):
        tokens_that_chose_it = sum(expert in chosen for chosen in expert_ids.tolist()) / 17
        mean_probability = sum(row.exp()[expert] / row.exp().sum() for row in logits) / 17
        balance += EXPERTS * tokens_that_chose_it * mean_probability / PER_TOKEN
    z = sum(row.exp().sum().log() ** 2 for row in logits) / 17
    assert_close(switch_auxiliary_loss(logits, expert_ids), 0.01 * balance + 0.001 * z)


def test_even_routing_costs_the_least():
    even = torch.arange(EXPERTS).repeat(3).unsqueeze(1)
    level = torch.zeros(len(even), EXPERTS)
    lopsided = torch.zeros(len(even), EXPERTS)
    lopsided[:, 0] = 5.0
    all_to_one = torch.zeros_like(even)
    assert switch_auxiliary_loss(level, even) < switch_auxiliary_loss(lopsided, all_to_one)
