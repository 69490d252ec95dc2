"""An HMAC for every record in a Redis that others can write to. It names the place too: a record that was moved is forged."""

import hmac
from dataclasses import dataclass, field
from hashlib import sha256

from keystore.errors import StoreCorrupted

MAC_BYTES = sha256().digest_size


@dataclass(frozen=True, slots=True)
class Seal:
    """Without a secret records go as they are, and nothing is checked."""

    secret: bytes = field(default=b"", repr=False)

    def close(self, body: bytes, *place: object) -> bytes:
        """What to store of `body` at a place: its MAC in front."""
        return self._mac(body, place) + body if self.secret else body

    def open(self, sealed: bytes, *place: object) -> bytes:
        """The body that was closed at this place. Raises StoreCorrupted when its MAC is wrong or missing."""
        if not self.secret:
            return sealed
        mac, body = sealed[:MAC_BYTES], sealed[MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(body, place)):
            where = ", ".join(map(str, place))
            raise StoreCorrupted(f"{where}: the record is not signed with this store's secret")
        return body

    def _mac(self, body: bytes, place: tuple[object, ...]) -> bytes:
        named = "\0".join(map(str, place)).encode()
        return hmac.digest(self.secret, len(named).to_bytes(4, "little") + named + body, "sha256")
