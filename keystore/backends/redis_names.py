"""Every name in Redis, and which shard a scope's statistics go to. N is a shard's number, or `global`.

    libration:models                     hash    endpoint -> tag of the model that came last
    libration:{TAG}:model                hash    model_id, anchors, shards, card
    libration:{TAG}:tip                  hash    sequence, audit_id, audit_hash: where the store stands
    libration:{TAG}:delta                stream  one entry a commit, its id is the commit's number
    libration:{TAG}:heads                hash    scope -> first version, fork, latest version
    libration:{TAG}:rows:SCOPE           hash    version -> metadata; `changes:`, `usage:` likewise
    libration:{TAG}:checkpoints:SCOPE    zset    versions that hold a whole overlay
    libration:{TAG}:frozen               set     names of frozen scopes
    libration:{TAG}:settling, passed     hashes  scope -> settling state, version that passed the canary
    libration:{TAG}:pool                 hash    generation -> change of the expert pool
    libration:{TAG}:audit                stream  the audit chain
    libration:{TAG}:used                 zset    session -> when it was last read or taught
    libration:{TAG}:session_floor        string  highest version of any deleted session
    libration:{TAG}:stats:N              stream  statistics of shard N that nobody has learned yet
    libration:{TAG}:watermarks:N         hash    producer -> last sequence that was learned
    libration:{TAG}:producer:ID          string  there while a producer may send an entry again
    libration:{TAG}:lease:N, epoch:N     strings who writes shard N, and how often that changed
    libration:{TAG}:workers              zset    worker -> when it was last seen
    libration:{TAG}:canary:SCOPE         string  who judges a scope just now

All names of one model share a hash tag, so that one transaction may span them.
"""

from dataclasses import dataclass
from uuid import UUID
from zlib import crc32

from keystore.records import ScopeId

MODELS = "libration:models"
GLOBAL_SHARD = (
    -1
)  # of the global scope alone: what everybody has is learned by servers, since they can judge it


@dataclass(frozen=True, slots=True)
class RedisNames:
    """The names of one model's data; `tag` tells models apart."""

    tag: str

    @property
    def model(self) -> str:
        return self._name("model")

    @property
    def tip(self) -> str:
        return self._name("tip")

    @property
    def delta(self) -> str:
        return self._name("delta")

    @property
    def heads(self) -> str:
        return self._name("heads")

    @property
    def frozen(self) -> str:
        return self._name("frozen")

    @property
    def settling(self) -> str:
        return self._name("settling")

    @property
    def passed(self) -> str:
        return self._name("passed")

    @property
    def pool(self) -> str:
        return self._name("pool")

    @property
    def audit(self) -> str:
        return self._name("audit")

    @property
    def session_floor(self) -> str:
        return self._name("session_floor")

    @property
    def used(self) -> str:
        return self._name("used")

    @property
    def workers(self) -> str:
        return self._name("workers")

    def rows(self, scope: ScopeId) -> str:
        return self._name("rows", scope)

    def changes(self, scope: ScopeId) -> str:
        return self._name("changes", scope)

    def usage(self, scope: ScopeId) -> str:
        return self._name("usage", scope)

    def checkpoints(self, scope: ScopeId) -> str:
        return self._name("checkpoints", scope)

    def canary(self, scope: ScopeId) -> str:
        return self._name("canary", scope)

    def stats(self, shard: int) -> str:
        return self._of_shard("stats", shard)

    def watermarks(self, shard: int) -> str:
        return self._of_shard("watermarks", shard)

    def producer(self, producer: UUID) -> str:
        return self._name("producer", producer.hex)

    def lease(self, shard: int) -> str:
        return self._of_shard("lease", shard)

    def epoch(self, shard: int) -> str:
        return self._of_shard("epoch", shard)

    def _of_shard(self, kind: str, shard: int) -> str:
        return self._name(kind, "global" if shard == GLOBAL_SHARD else str(shard))

    def _name(self, kind: str, of: ScopeId | str | None = None) -> str:
        return f"libration:{{{self.tag}}}:{kind}" + ("" if of is None else f":{of}")


def shard_of(scope: ScopeId, shards: int) -> int:
    """Where a scope is learned: sessions with their tenant, whose versions they fork from."""
    return GLOBAL_SHARD if scope.kind == "global" else crc32(scope.tenant.encode()) % shards
