"""Mixture of Masters: every equation against a loop over tokens that is written down plainly."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from model.blocks.base import BlockSpan, ExpertUsage
from model.blocks.masters import MASTERS, MemoryMaster, PlainFfnMaster
from model.blocks.mom import MomBlock, MomConfig
from model.errors import UnsupportedConfig
from model.flow_attention import NUM_HEADS, FlowAttention
from model.recurrence import WholeWindows

HIDDEN, LENGTH = 32, 20
CONFIG = MomConfig(
    kind="mom", layers=(0,), hidden_size=HIDDEN, num_experts=4, num_experts_per_tok=2, expert_size=24
)


def random_block(**choices):
    torch.manual_seed(8)
    block = MomBlock(replace(CONFIG, **choices)).requires_grad_(requires_grad=False)
    for parameter in block.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return block


def serve(block, hidden, state=None, start=0, usage=None):
    span = BlockSpan(0, len(hidden), start, None, None, decode=False, state={} if state is None else state)
    with torch.inference_mode():
        return block.serve(hidden, 0, [span], usage or ExpertUsage.of(block.config))


def text(length=LENGTH):
    return torch.randn(length, HIDDEN, generator=torch.Generator().manual_seed(9))


class LoopMemory:
    """One token after the other."""

    def run(self, slot, values, decay):
        state, sums = torch.zeros(values.shape[1]), []
        for row in values:
            state = decay * state + row
            sums.append(state)
        return torch.stack(sums)


def spelled_out(block, hidden):
    """The module docstring's equations, token by token."""
    config, memory = block.config, LoopMemory()
    x = block.normed(hidden)
    if block.attention is not None:
        x = x + block.attention(x, memory, 0)
    positions = torch.arange(len(x))
    masters = [m.ffn(m.prepare(x, positions, memory, 0)) for m in block.masters]
    contributions = []
    summed, weight = torch.zeros(HIDDEN), 0.0
    for t in range(len(x)):
        raw = block.temperature_proj[0] @ x[t] + block.temperature_bias[0]
        if config.temperature == "sigmoid":
            tau = 1 / (1 + (-raw).exp())
        else:
            tau = (0.01 + (1 + raw.exp()).log()).clamp(0.01, 10)
        active = float(tau >= config.bypass_threshold)
        outputs = torch.stack([m[t] for m in masters])
        context = sum(block.context_weights[i] * outputs[i] for i in range(len(outputs))) * active
        decay = 1.0 if config.flow == "sum" else config.flow_decay
        summed, weight = decay * summed + context, decay * weight + active
        flow = summed if config.flow == "sum" else summed / max(weight, 1e-30)
        gates = ((block.gate_proj @ x[t]) / tau).exp()
        gates = gates / gates.sum()
        if config.routing == "topk":
            chosen = sorted(range(len(gates)), key=lambda i: -gates[i])[: config.num_experts_per_tok]
            kept = torch.zeros_like(gates)
            kept[chosen] = gates[chosen]
            gates = kept / kept.sum()
        gated = sum(gates[i] * outputs[i] for i in range(len(outputs)))
        integrated = block.integrate_proj @ torch.cat((context, flow))
        alpha = block.blend.sigmoid()
        mixed = alpha * integrated + (1 - alpha) * gated
        contributions.append(
            active * block.gamma * (mixed if config.routing == "hybrid" else integrated + gated)
        )
    return torch.stack(contributions)


@pytest.mark.parametrize("routing", ["soft", "topk", "hybrid"])
@pytest.mark.parametrize("flow", ["mean", "sum"])
@pytest.mark.parametrize("temperature", ["softplus", "sigmoid"])
@pytest.mark.parametrize("attention", ["none", "flow"])
def test_a_block_is_its_equations(routing, flow, temperature, attention):
    block = random_block(routing=routing, flow=flow, temperature=temperature, attention=attention)
    block.temperature_bias.fill_(0.2)
    hidden = text()
    expected = spelled_out(block, hidden)
    assert 0 < (expected == 0).all(1).sum() < LENGTH, "some tokens pass by, some do not"
    assert_close(serve(block, hidden), expected, atol=2e-5, rtol=1e-4)
    assert_close(block(hidden.unsqueeze(0))[0][0], expected, atol=2e-5, rtol=1e-4)
    with torch.enable_grad():
        block.requires_grad_()
        assert_close(block(hidden.unsqueeze(0))[0][0].detach(), expected, atol=2e-5, rtol=1e-4)


def test_temperatures_start_at_one_and_keep_their_bounds():
    fresh = MomBlock(CONFIG)
    assert_close(fresh.temperatures(text()), torch.ones(LENGTH, 1))
    block = random_block()
    block.temperature_proj.mul_(1000)
    taus = block.temperatures(text())
    assert taus.min().item() == pytest.approx(0.01)
    assert taus.max().item() == pytest.approx(10.0)


def test_the_literal_temperature_is_a_sigmoid():
    block = random_block(temperature="sigmoid")
    rows = text()
    expected = (rows @ block.temperature_proj.T + block.temperature_bias).sigmoid().clamp_min(0.01)
    assert_close(block.temperatures(rows), expected)
    assert (MomBlock(replace(CONFIG, temperature="sigmoid")).temperatures(rows) > 0.98).all()


@pytest.mark.parametrize("routing", ["soft", "hybrid"])
def test_soft_gates_sum_to_one_and_low_temperatures_sharpen_them(routing):
    block = random_block(routing=routing)
    warm, cold = (block.gates(text(), torch.full((LENGTH, 1), tau)) for tau in (2.0, 0.1))
    assert_close(warm.sum(-1), torch.ones(LENGTH))
    assert (warm > 0).all()
    assert (cold.max(-1).values > warm.max(-1).values).all()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_keeps_exactly_k_masters_and_renormalises_them(k):
    block = random_block(routing="topk", num_experts_per_tok=k)
    soft = random_block(routing="soft")
    tau = torch.ones(LENGTH, 1)
    gates, all_gates = block.gates(text(), tau), soft.gates(text(), tau)
    kept = gates > 0
    assert (kept.sum(-1) == k).all()
    assert_close(gates.sum(-1), torch.ones(LENGTH))
    assert_close(gates, all_gates * kept / (all_gates * kept).sum(-1, keepdim=True))
    assert ((all_gates * kept).sum(-1) >= all_gates.topk(k).values.sum(-1) - 1e-6).all()


def without_memory_of_places(**choices):
    """Three Masters of which none knows what stood before or where, so that only the flow ties tokens together."""
    block = random_block(num_experts=3, **choices)
    block.masters[0].position_proj.zero_()
    return block


def passing(block, hidden):
    return (block.temperatures(block.normed(hidden)) < block.config.bypass_threshold).squeeze(-1)


@pytest.mark.parametrize("flow", ["mean", "sum"])
def test_a_token_that_passes_by_gets_exactly_nothing_and_leaves_no_mark(flow):
    block = without_memory_of_places(flow=flow, flow_decay=1.0)
    hidden = text()
    by = passing(block, hidden)
    assert 0 < by.sum() < LENGTH
    contribution = serve(block, hidden)
    assert not contribution[by].any()
    assert contribution[~by].any(dim=1).all()
    assert_close(serve(block, hidden[~by]), contribution[~by], atol=1e-5, rtol=1e-4)


def test_masters_do_not_run_for_tokens_that_pass_by(monkeypatch):
    block = random_block()
    hidden = text()
    ran = []
    original = PlainFfnMaster.ffn

    def counting(master, rows):
        ran.append(int(rows.any(dim=1).sum()))
        return original(master, rows)

    monkeypatch.setattr(PlainFfnMaster, "ffn", counting)
    usage = ExpertUsage.of(CONFIG)
    serve(block, hidden, usage=usage)
    active = int((~passing(block, hidden)).sum())
    assert ran == [active] * 3
    assert usage.counts.sum() == active * CONFIG.num_experts_per_tok


def test_nobody_runs_when_every_token_passes_by():
    block = random_block()
    block.temperature_proj.zero_()
    block.temperature_bias.fill_(-20.0)
    usage = ExpertUsage.of(CONFIG)
    assert not serve(block, text(), usage=usage).any()
    assert usage.counts.sum() == 0


def test_the_step_that_lets_tokens_by_has_a_straight_through_gradient():
    block = random_block()
    block.temperature_bias.fill_(-0.6)
    block.temperature_proj.zero_()
    assert passing(block, text()).all()
    block.requires_grad_()
    contribution, _ = block(text().unsqueeze(0))
    assert not contribution.any()
    contribution.sum().backward()
    assert block.temperature_bias.grad.abs() > 1e-6


def test_the_blend_goes_from_gated_masters_to_the_shared_flow():
    hidden = text()
    block = random_block(routing="hybrid", bypass_threshold=0.0)
    outputs = {}
    for name, logit in (("gated", -100.0), ("shared", 100.0), ("even", 0.0)):
        block.blend.fill_(logit)
        outputs[name] = serve(block, hidden)
    assert_close(outputs["even"], (outputs["gated"] + outputs["shared"]) / 2, atol=1e-5, rtol=1e-4)
    both = random_block(routing="soft", bypass_threshold=0.0)
    assert_close(serve(both, hidden), outputs["gated"] + outputs["shared"], atol=1e-5, rtol=1e-4)


def test_a_fresh_block_contributes_zero_but_learns():
    block = MomBlock(CONFIG)
    assert not block.gamma.any()
    contribution, _ = block(text().unsqueeze(0))
    assert not contribution.any()
    contribution.sum().backward()
    assert block.gamma.grad.abs().min() > 0


def test_backward_flow_is_refused():
    with pytest.raises(UnsupportedConfig, match="sees later tokens"):
        MomBlock(replace(CONFIG, backward_flow=True))


@pytest.mark.parametrize("choice", ["flow", "temperature", "routing", "attention"])
def test_an_unknown_choice_is_refused_by_name(choice):
    with pytest.raises(UnsupportedConfig, match=f"{choice} is 'magic'; allowed"):
        MomBlock(replace(CONFIG, **{choice: "magic"}))


@pytest.mark.parametrize("decay", [0.0, 1.1])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(UnsupportedConfig, match=f"flow_decay is {decay}"):
        MomBlock(replace(CONFIG, flow_decay=decay))


def test_the_memory_master_adds_a_decaying_mean_of_everything_before():
    torch.manual_seed(1)
    master = MemoryMaster(HIDDEN, 24).requires_grad_(requires_grad=False)
    torch.nn.init.normal_(master.memory_scale)
    rows = text()
    prepared = master.prepare(rows.unsqueeze(0), torch.arange(LENGTH), WholeWindows(), 0)[0]
    decay = 1 / (1 + (-master.decay_logits).exp())
    memory = torch.zeros(HIDDEN)
    for t, row in enumerate(rows):
        memory = decay * memory + (1 - decay) * row
        expected = row + master.memory_scale * memory + master.domain_embedding
        assert_close(prepared[t], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["none", "flow"])
def test_a_sequences_state_never_grows(attention):
    block = random_block(attention=attention)
    state = {}
    shapes = set()
    for start, length in ((0, 1), (1, 1), (2, 100), (102, 1)):
        serve(block, text(length), state, start)
        shapes.add(state[0].shape)
    assert shapes == {(block.state_slots, HIDDEN)}
    assert block.state_slots == (3 if attention == "none" else 5)
    assert state[0].dtype == torch.float32


@pytest.mark.parametrize("attention", ["none", "flow"])
@pytest.mark.parametrize("masters", [1, 2, 6])
def test_any_number_of_masters_reads_in_chunks_what_it_reads_in_one_pass(masters, attention):
    per_token = min(2, masters)
    block = random_block(num_experts=masters, num_experts_per_tok=per_token, attention=attention)
    assert [type(m) for m in block.masters] == [MASTERS[i % 4] for i in range(masters)]
    hidden = text()
    whole = serve(block, hidden)
    state = {}
    parts = [
        serve(block, hidden[:7], state),
        serve(block, hidden[7:8], state, 7),
        serve(block, hidden[8:], state, 8),
    ]
    assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-4)
    assert_close(whole, spelled_out(block, hidden), atol=2e-5, rtol=1e-4)


def test_masters_start_differently():
    down = [m.down_proj for m in MomBlock(CONFIG).masters if isinstance(m, PlainFfnMaster)]
    assert_close(down[0] @ down[0].T, torch.eye(24), atol=1e-5, rtol=0)
    assert down[1].abs().max() <= (6 / (24 + HIDDEN)) ** 0.5
    assert down[2].std().item() == pytest.approx((2 / HIDDEN) ** 0.5, rel=0.1)


def test_flow_attention_is_a_gated_running_mean_of_values():
    torch.manual_seed(3)
    attention = FlowAttention(HIDDEN).requires_grad_(requires_grad=False)
    torch.nn.init.normal_(attention.o_proj)
    rows = text()
    mixed = attention(rows.unsqueeze(0), WholeWindows(), 0)[0]
    head = HIDDEN // NUM_HEADS
    queries, keys, values = (rows @ part.T for part in attention.qkv_proj.chunk(3))
    for t in range(LENGTH):
        flow = torch.empty(HIDDEN)
        for channel in range(HIDDEN):
            decay = attention.decay_logits[channel // head].sigmoid()
            weights = [decay ** (t - s) * keys[s, channel].exp() for s in range(t + 1)]
            mean = sum(w * values[s, channel] for s, w in enumerate(weights)) / sum(weights)
            flow[channel] = mean * queries[t, channel].sigmoid()
        assert_close(mixed[t], attention.o_proj @ flow, atol=1e-4, rtol=1e-4)


def test_flow_attention_survives_extreme_keys():
    attention = FlowAttention(HIDDEN).requires_grad_(requires_grad=False)
    torch.nn.init.normal_(attention.o_proj)
    attention.qkv_proj.mul_(1e4)
    assert attention(text(200).unsqueeze(0), WholeWindows(), 0).isfinite().all()


def test_the_balance_loss_is_zero_for_even_gates_and_grows_with_uneven_ones():
    block = random_block(routing="soft")
    block.gate_proj.zero_()
    assert block(text().unsqueeze(0))[1] < 1e-9
    block.gate_proj[0] = block.normed(text()).mean(0) * 50
    mean_gates = block.gates(block.normed(text()), block.temperatures(block.normed(text()))).mean(0)
    expected = 0.01 * 4 * (mean_gates - 0.25).square().sum()
    assert_close(block(text().unsqueeze(0))[1], expected)
    assert expected > 1e-3
