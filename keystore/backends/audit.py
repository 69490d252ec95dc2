"""The audit chain: each row's hash covers the one before it, so that history cannot be edited unseen."""

import hashlib
import json
from collections.abc import Iterable, Mapping

from keystore.errors import StoreCorrupted

GENESIS = "0" * 64


def canonical_json(event: Mapping[str, object]) -> str:
    """One spelling per event: sorted keys, no spaces, ASCII."""
    return json.dumps(event, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def chain_hash(previous: str, event: str) -> str:
    """sha256 hex of the previous hash's bytes followed by the event's canonical JSON."""
    return hashlib.sha256(bytes.fromhex(previous) + event.encode("ascii")).hexdigest()


def verify_chain(rows: Iterable[tuple[int, str, str]], *, from_start: bool = True) -> int:
    """Walk (id, event, hash) rows in order and return the last id.

    A chain whose oldest rows are gone on purpose is walked from its first row, which is taken on trust. Raises
    StoreCorrupted at the first break.
    """
    previous, length = GENESIS, 0
    for audit_id, event, recorded in rows:
        follows = audit_id == length + 1 and chain_hash(previous, event) == recorded
        if not follows and (from_start or length):
            raise StoreCorrupted(
                f"audit chain breaks at row {audit_id}: its hash does not follow from row {length}"
            )
        previous, length = recorded, audit_id
    return length
