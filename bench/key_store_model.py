"""A model of the sizes of the shipped `some`, stores of it, and windows to teach it."""

import numpy as np

from keystore.backends.base import Backend
from keystore.backends.redis_model import ModelCard
from keystore.backends.redis_seal import Seal
from keystore.records import GravityConfig, ScopeId
from keystore.statistics import RoutingStats, TokenCredit, TokenTrace
from keystore.store import KeyStore

LAYERS, EXPERTS, DIM, PER_TOKEN, CANDIDATES, WINDOW = (17, 21, 25, 29), 64, 96, 4, 16, 256
SHARDS, TENANTS = 8, 32
GRAVITY, SEAL = GravityConfig(), Seal()
NEVER = 1e9


def make_card(endpoint: str) -> ModelCard:
    rng = np.random.default_rng(0)
    anchors = {layer: rng.standard_normal((EXPERTS, DIM), dtype=np.float32) for layer in LAYERS}
    return ModelCard(endpoint, "bench", PER_TOKEN, LAYERS, anchors)


def make_window(scope: ScopeId, seed: int) -> RoutingStats:
    rng, traces = np.random.default_rng(seed), dict[int, TokenTrace]()
    for layer in LAYERS:
        order = rng.random((WINDOW, EXPERTS)).argsort(axis=1)
        weights = rng.standard_normal((WINDOW, CANDIDATES), dtype=np.float32)
        credit = TokenCredit(order[:, :CANDIDATES], weights)
        queries = rng.standard_normal((WINDOW, DIM), dtype=np.float32)
        traces[layer] = TokenTrace(order[:, :PER_TOKEN], queries, EXPERTS, credit)
    return RoutingStats.from_tokens(scope, traces)


def open_store(backend: Backend, card: ModelCard, **options: object) -> KeyStore:
    sizes = {"num_experts_per_tok": PER_TOKEN, "plastic_layers": LAYERS}
    return KeyStore(card.model_id, card.anchors, GRAVITY, backend, **sizes, **options)
