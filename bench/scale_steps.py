"""Batches of made-up sequences through the model, without server and without engine, and what they are made of.

S sequences, E experts.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from keystore.index_builder import IndexBuilder
from keystore.learning import create_origin
from keystore.records import Float32Array, GravityConfig, ScopeId
from keystore.snapshot import KeySnapshot, build_indexes
from model.blocks import build_block
from model.blocks.base import BlockConfig, ExpertBlock, ExpertUsage
from model.kv_cache import CacheBudget, SequenceCache
from model.transformer import Segment, Transformer, Variant

EXACT_LIMIT = 16_384  # keys a layer up to which the key store searches all of them: its own default
OF_EXPERTS = ("anchors", "experts.")  # how parameters begin that have a row for each expert


def full_caches(model: Transformer, count: int, tokens: int) -> list[SequenceCache]:
    """Caches of so many sequences, as if `tokens` had been read: random keys and values, alike in each."""
    budget = CacheBudget(model.config, count * CacheBudget.rounded(tokens), model.dtype, model.device)
    caches = [budget.reserve(tokens) for _ in range(count)]
    for tensor in (caches[0].keys, caches[0].values):
        tensor.normal_(generator=torch.Generator(model.device).manual_seed(0))
    for cache in caches[1:]:
        cache.keys.copy_(caches[0].keys)
        cache.values.copy_(caches[0].values)
    return caches


def writing_speed(
    model: Transformer,
    caches: Sequence[SequenceCache],
    context: int,
    steps: int,
    variant: Variant | None = None,
    views: Sequence[KeySnapshot] = (),
) -> float:
    """Tokens per second of all sequences, greedily chosen, over the last `steps` tokens up to `context` each.

    `views` (S): the keys that each sees; none for a variant without keys. The median step counts.
    """
    tokens = list(range(1, len(caches) + 1))
    spent: list[float] = []
    for position in range(context - steps, context):
        started = time.perf_counter()
        segments = [
            Segment((token,), position, cache, variant, views[i] if views else None, decode=True)
            for i, (token, cache) in enumerate(zip(tokens, caches, strict=True))
        ]
        tokens = model.logits(model.step(segments), written=True).argmax(1).tolist()
        spent.append(time.perf_counter() - started)
    return len(caches) / statistics.median(spent)


def reading_speed(
    model: Transformer,
    cache: SequenceCache,
    context: int,
    chunk: int,
    variant: Variant | None = None,
    view: KeySnapshot | None = None,
) -> float:
    """Tokens per second of a prompt of `context` tokens, read in chunks as the scheduler cuts them."""
    prompt = [1 + 7 * i % (model.config.vocab_size - 1) for i in range(context)]
    started = time.perf_counter()
    for start in range(0, context, chunk):
        hidden = model.step([Segment(prompt[start : start + chunk], start, cache, variant, view)])
    model.logits(hidden[-1:], written=True)
    return context / (time.perf_counter() - started)


def anchor_view(anchors: dict[int, Float32Array]) -> KeySnapshot:
    """Version 0 of a key store with these anchors (E, D) by layer."""
    return create_origin("bench", anchors, GravityConfig(), anchors.keys(), IndexBuilder(EXACT_LIMIT), 0.0)


def scope_view(origin: KeySnapshot, number: int) -> KeySnapshot:
    """A version of another tenant, every key of which has moved within the trust radius."""
    rng, keys = np.random.default_rng(number), dict[int, Float32Array]()
    for layer, anchors in origin.keys.items():
        moves = rng.standard_normal(anchors.shape, dtype=np.float32)
        reach = 0.9 * GravityConfig().trust_radius * np.linalg.norm(anchors, axis=1, keepdims=True)
        keys[layer] = anchors + moves * (reach / np.linalg.norm(moves, axis=1, keepdims=True))
    scope = ScopeId("tenant", f"tenant-{number}")
    return replace(origin, scope=scope, version=1, parent=0, indexes=build_indexes(keys, origin.indexes))


class RandomExperts:
    """Blocks of `some` with any number of random experts up to `most`.

    All layers have the same experts, so that the largest fit into memory; each has keys of its own.
    """

    def __init__(self, config: BlockConfig, most: int):
        self.config = config
        generator = torch.Generator().manual_seed(0)
        self._weights = {
            name: torch.empty(like.shape).normal_(std=like.shape[-1] ** -0.5, generator=generator)
            for name, like in _empty_block(replace(config, num_experts=most)).state_dict().items()
        }
        self._weights["norm"].fill_(1.0)
        rng = np.random.default_rng(0)
        shape = self._weights["anchors"].shape
        self._keys = {layer: rng.standard_normal(shape, dtype=np.float32) for layer in config.layers}

    def first(self, count: int) -> tuple[Variant, KeySnapshot]:
        """A variant with the first `count` experts in every layer, and its keys."""
        config = replace(self.config, num_experts=count)
        weights = {
            name: each[:count] if name.startswith(OF_EXPERTS) else each
            for name, each in self._weights.items()
        }
        blocks: dict[int, ExpertBlock] = {}
        for layer in config.layers:
            blocks[layer] = _empty_block(config)
            blocks[layer].load_state_dict(weights, assign=True)
            blocks[layer].requires_grad_(requires_grad=False)
        view = anchor_view({layer: keys[:count] for layer, keys in self._keys.items()})
        return Variant(blocks, ExpertUsage.of(config)), view


def _empty_block(config: BlockConfig) -> ExpertBlock:
    with torch.device("meta"):
        return build_block(config)
