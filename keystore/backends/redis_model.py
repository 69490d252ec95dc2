"""What a worker must know of a model to teach its keys: its anchors and sizes, put into Redis by the first replica."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import cast

import numpy as np

from keystore.backends.audit import canonical_json
from keystore.backends.base import RowChanges
from keystore.backends.blobs import pack_changes, unpack_changes
from keystore.backends.redis_client import RedisClient
from keystore.backends.redis_names import MODELS, RedisNames
from keystore.backends.redis_seal import Seal
from keystore.errors import InvalidConfig, ModelMismatch, StoreCorrupted
from keystore.records import Float32Array

TAG_CHARS = 16


@dataclass(frozen=True, slots=True, eq=False)
class ModelCard:
    """One endpoint's model, as far as its keys are concerned; never changes under one tag."""

    endpoint: str
    model_id: str
    num_experts_per_tok: int
    plastic_layers: tuple[int, ...]
    anchors: Mapping[int, Float32Array]  # (M, D) of every layer with routing keys

    @property
    def names(self) -> RedisNames:
        """Where everything of this model is."""
        return RedisNames(tag_of(self.pack()))

    def pack(self) -> bytes:
        """One line of JSON, then the anchors."""
        words = {
            "endpoint": self.endpoint,
            "model_id": self.model_id,
            "num_experts_per_tok": self.num_experts_per_tok,
            "plastic_layers": sorted(self.plastic_layers),
        }
        rows = {layer: RowChanges(np.arange(len(keys)), keys) for layer, keys in self.anchors.items()}
        return canonical_json(words).encode("ascii") + b"\n" + pack_changes(rows)

    @classmethod
    def unpack(cls, blob: bytes) -> "ModelCard":
        """Inverse of `pack`. Raises ValueError."""
        line, _, rows = blob.partition(b"\n")
        words = cast("dict[str, object]", json.loads(line))
        return cls(
            endpoint=str(words["endpoint"]),
            model_id=str(words["model_id"]),
            num_experts_per_tok=int(cast("int", words["num_experts_per_tok"])),
            plastic_layers=tuple(cast("list[int]", words["plastic_layers"])),
            anchors={layer: change.rows for layer, change in unpack_changes(rows).items()},
        )


def tag_of(packed: bytes) -> str:
    """The tag of a packed card: it cannot be exchanged unseen."""
    return sha256(packed).hexdigest()[:TAG_CHARS]


def read_models(client: RedisClient) -> Mapping[str, RedisNames]:
    """Endpoint to the names of its model, of every model that was ever adopted; of one endpoint the last to come.

    Raises StoreUnavailable.
    """
    found = client.call("HGETALL", MODELS)
    return {endpoint.decode(): RedisNames(tag.decode()) for endpoint, tag in found.items()}


def read_card(client: RedisClient, names: RedisNames, seal: Seal) -> tuple[ModelCard, int] | None:
    """The model and the number of its shards; None before a replica has put it there.

    Raises StoreUnavailable, StoreCorrupted.
    """
    sealed, shards = client.call("HMGET", names.model, "card", "shards")
    if sealed is None:
        return None
    packed = seal.open(sealed, names.model, "card")
    if tag_of(packed) != names.tag:
        raise StoreCorrupted(f"{names.model}: the card's checksum is not {names.tag}")
    try:
        return ModelCard.unpack(packed), int(shards)
    except (ValueError, KeyError, TypeError) as error:
        raise StoreCorrupted(f"{names.model}: {error}") from error


def claim_model(
    client: RedisClient, names: RedisNames, model_id: str, anchors_checksum: str, shards: int
) -> None:
    """Claim an empty store for a model, or check that it is this one's.

    Raises StoreUnavailable, ModelMismatch, and InvalidConfig when the store has another number of shards.
    """
    offered = {"model_id": model_id, "anchors": anchors_checksum, "shards": str(shards)}
    claims = [("HSETNX", names.model, name, given) for name, given in offered.items()]
    *_, found = client.batch([*claims, ("HMGET", names.model, *offered)], atomic=True)
    for (name, given), stored in zip(offered.items(), map(bytes.decode, found), strict=True):
        if stored != given and name == "shards":
            raise InvalidConfig("shards", given, f"{stored}, as the store was made with")
        if stored != given:
            raise ModelMismatch(
                f"{names.model} holds keys of {name} {stored!r}, not of {given!r}; allowed: one model"
            )


def write_card(client: RedisClient, names: RedisNames, card: ModelCard, seal: Seal) -> None:
    """Put a model there for the workers, and its endpoint on the list. Raises StoreUnavailable."""
    client.batch(
        [
            ("HSETNX", names.model, "card", seal.close(card.pack(), names.model, "card")),
            ("HSET", MODELS, card.endpoint, names.tag),
        ]
    )
