"""What is kept of prompts' beginnings, by itself: whose it is, how much it is, who makes room."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from model.config import ModelConfig
from model.kv_cache import POSITION_BLOCK, CacheBudget
from server.engine.prefix_cache import PrefixCache, PrefixUse

TINY = ModelConfig(
    vocab_size=8,
    hidden_size=4,
    intermediate_size=4,
    num_hidden_layers=2,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=2,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=4096,
    bos_token_id=1,
    eos_token_id=2,
)
CUT = 2 * POSITION_BLOCK
B = POSITION_BLOCK
ANYBODY = PrefixUse("scope")


def make_budget(tokens: int) -> CacheBudget:
    return CacheBudget(TINY, tokens, torch.float32, torch.device("cpu"))


def fingerprint(scope: str, tokens: tuple[int, ...]) -> float:
    """What a row stands for: all that it hangs on."""
    return float(hash((scope, tokens)) % 1_000_003)


def read(cache, scope: str, prompt: tuple[int, ...], first: int, end: int, *, memory: bool) -> None:
    for position in range(first, end):
        row = fingerprint(scope, prompt[: position + 1])
        cache.keys[:, :, position] = row
        cache.values[:, :, position] = -row
    if memory:
        cache.block_states[1] = torch.tensor([fingerprint(scope, prompt[:end])])


def holds(cache, scope: str, prompt: tuple[int, ...], tokens: int) -> bool:
    rows = torch.tensor([fingerprint(scope, prompt[: i + 1]) for i in range(tokens)])
    expected = rows[:, None].expand(2, 1, tokens, 2)
    return torch.equal(cache.keys[:, :, :tokens], expected) and torch.equal(
        cache.values[:, :, :tokens], -expected
    )


@pytest.fixture
def budget():
    return make_budget(64 * B)


@pytest.fixture
def prefixes(budget):
    return PrefixCache(8 * B, budget, CUT)


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple((seed + i * i) % 7 for i in range(length))


def leave(prefixes, budget, prompt, use=ANYBODY, *, memory=False):
    """A prompt that is read in chunks, as the engine does it."""
    cache = budget.reserve(len(prompt))
    for first in range(0, len(prompt), CUT):
        end = min(first + CUT, len(prompt))
        read(cache, use.scope, prompt, first, end, memory=memory)
        prefixes.keep(use, prompt, end, cache)
    budget.release(cache)


def taken(prefixes, budget, prompt, use=ANYBODY):
    cache = budget.reserve(len(prompt))
    tokens = prefixes.take(use, prompt, cache)
    assert holds(cache, use.scope, prompt, tokens)
    budget.release(cache)
    return tokens


def test_whole_blocks_of_a_common_beginning_are_taken(prefixes, budget):
    leave(prefixes, budget, prompt_of(3 * B + 10))
    assert prefixes.tokens == 3 * B
    assert taken(prefixes, budget, (*prompt_of(3 * B), 5, 5)) == 3 * B
    assert taken(prefixes, budget, (*prompt_of(2 * B + 5), *[6] * B)) == 2 * B
    assert taken(prefixes, budget, (6, *prompt_of(3 * B)[1:])) == 0


def test_the_last_token_is_always_left_to_compute(prefixes, budget):
    leave(prefixes, budget, prompt_of(2 * B))
    assert taken(prefixes, budget, prompt_of(2 * B)) == B
    assert taken(prefixes, budget, prompt_of(2 * B + 1)) == 2 * B


def test_nothing_is_found_under_another_scope(prefixes, budget):
    leave(prefixes, budget, prompt_of(2 * B))
    assert taken(prefixes, budget, prompt_of(3 * B), PrefixUse("other")) == 0


def test_who_teaches_takes_only_what_has_taught(prefixes, budget):
    reader, teacher = ANYBODY, PrefixUse("scope", teaches=True)
    leave(prefixes, budget, prompt_of(3 * B), reader)
    assert taken(prefixes, budget, prompt_of(4 * B), teacher) == 0
    leave(prefixes, budget, prompt_of(3 * B), teacher)
    assert taken(prefixes, budget, prompt_of(4 * B), teacher) == 2 * B, "nothing followed the last row"
    leave(prefixes, budget, prompt_of(4 * B), teacher)
    assert taken(prefixes, budget, prompt_of(4 * B), teacher) == 3 * B
    assert taken(prefixes, budget, prompt_of(4 * B + 1), reader) == 4 * B


def test_memory_of_expert_blocks_is_taken_where_prompts_are_cut(prefixes, budget):
    leave(prefixes, budget, prompt_of(3 * B), memory=True)
    longer = prompt_of(4 * B)
    cache = budget.reserve(len(longer))
    assert prefixes.take(ANYBODY, longer, cache) == 2 * B
    assert cache.block_states[1].tolist() == [fingerprint("scope", longer[: 2 * B])]
    cache.block_states[1] += 1
    again = budget.reserve(len(longer))
    prefixes.take(ANYBODY, longer, again)
    assert again.block_states[1].tolist() == [fingerprint("scope", longer[: 2 * B])], (
        "nobody writes what is kept"
    )


def test_what_was_used_longest_ago_makes_room(prefixes, budget):
    old, used, new = prompt_of(4 * B, 1), prompt_of(4 * B, 2), prompt_of(4 * B, 3)
    leave(prefixes, budget, old)
    leave(prefixes, budget, used)
    assert taken(prefixes, budget, (*old, 0)) == 4 * B
    leave(prefixes, budget, new)
    assert [taken(prefixes, budget, (*each, 0)) for each in (old, used, new)] == [4 * B, 0, 4 * B]
    assert prefixes.evicted_tokens == 4 * B


def test_of_a_prompt_that_is_too_long_the_beginning_is_kept(prefixes, budget):
    leave(prefixes, budget, prompt_of(20 * B))
    assert taken(prefixes, budget, prompt_of(20 * B)) == 8 * B
    assert prefixes.evicted_tokens == 0


def test_reservations_push_out_what_is_kept(prefixes, budget):
    leave(prefixes, budget, prompt_of(8 * B + 1))
    running = budget.reserve(61 * B)
    prefixes.give_way()
    assert prefixes.tokens == 3 * B
    budget.release(running)
    assert taken(prefixes, budget, prompt_of(8 * B)) == 3 * B, "the end goes before the beginning"


def test_without_a_limit_nothing_is_kept(budget):
    nothing = PrefixCache(0, budget, CUT)
    leave(nothing, budget, prompt_of(4 * B))
    assert nothing.tokens == nothing.evicted_tokens == 0


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=6)  # a block is one token many times


@settings(max_examples=60, stateful_step_count=30, deadline=None)
class PrefixMachine(RuleBasedStateMachine):
    """Prompts that come, are read, end early, are cancelled, under several scopes and little memory."""

    @initialize(limit=st.integers(0, 12), memory=st.booleans())
    def begin(self, limit, memory):
        self.budget = make_budget(20 * B)
        self.prefixes = PrefixCache(limit * B, self.budget, CUT)
        self.limit, self.memory = limit * B, memory
        self.running = []
        self.taught = set()

    @rule(
        blocks=TOKENS,
        rest=st.integers(1, B),
        scope=st.sampled_from("ab"),
        teaches=st.booleans(),
        takes=st.booleans(),
    )
    def admit(self, blocks, rest, scope, teaches, takes):
        prompt = (*(token for token in blocks for _ in range(B)), *[7] * rest)
        if not self.budget.fits(len(prompt)):
            return
        use = PrefixUse(scope, takes, teaches)
        cache = self.budget.reserve(len(prompt))
        self.prefixes.give_way()
        taken = self.prefixes.take(use, prompt, cache) if takes else 0
        assert taken < len(prompt)
        assert taken % (CUT if self.memory else B) == 0
        assert holds(cache, scope, prompt, taken)
        if taken and self.memory:
            assert cache.block_states[1].tolist() == [fingerprint(scope, prompt[:taken])]
        if teaches:
            assert all((scope, prompt[: i + 1]) in self.taught for i in range(taken))
        self.running.append([use, prompt, cache, taken])

    @rule(which=st.integers(0, 9))
    def read_a_chunk(self, which):
        if not self.running:
            return
        sequence = self.running[which % len(self.running)]
        use, prompt, cache, done = sequence
        end = min(len(prompt), (done // CUT + 1) * CUT)
        read(cache, use.scope, prompt, done, end, memory=self.memory)
        if use.teaches:
            self.taught |= {(use.scope, prompt[: i + 1]) for i in range(done, min(end, len(prompt) - 1))}
        self.prefixes.keep(use, prompt, end, cache)
        sequence[3] = end
        if end == len(prompt):
            self.leave(which)

    @rule(which=st.integers(0, 9))
    def leave(self, which):
        if self.running:
            self.budget.release(self.running.pop(which % len(self.running))[2])

    @invariant()
    def there_is_never_more_than_allowed(self):
        if not hasattr(self, "prefixes"):
            return
        assert self.prefixes.tokens <= min(self.limit, self.budget.free_tokens)

    @invariant()
    def every_block_can_be_found(self):
        if not hasattr(self, "prefixes"):
            return
        blocks = self.prefixes._blocks
        for parent, _ in blocks:
            assert isinstance(parent, str) or parent in blocks.values()


TestPrefixMachine = PrefixMachine.TestCase
