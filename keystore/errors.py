"""What can go wrong with keys, for the caller.

KeyStoreError
├── InvalidConfig            a gravity setting or scope name outside its range (also a ValueError)
├── InvalidStatistics        statistics that do not fit the store: shape, expert id, layer (also a ValueError)
│   └── NonFiniteStatistics  NaN or infinity among queries or weights
├── NonFiniteQueries         a search whose inner products are NaN or infinite
├── KeyVersionUnavailable    unknown, thinned or expired version
├── InvalidExperts           an expert group that does not fit: name, layer, shape, values (also a ValueError)
├── ExpertGroupExists        the name of an expert group is taken, for ever
├── UnknownExpertGroup       no expert group of that name
├── WrongGroupState          an expert group that has settled or was retired already
├── ExpertNotVisible         scores of an expert that the version does not have or hides
├── VersionConflict          the scope's latest version is not the one the caller named, or the pool changed
├── OutOfBounds              keys outside the trust region of their anchors, or not finite
├── StoreCorrupted           stored bytes that contradict their sizes, checksum or audit chain
├── ModelMismatch            stored or imported keys belong to another model
├── InvalidSnapshot          a snapshot file that contradicts itself or does not fit this store
├── CanaryFailed             keys for the global scope, or for everybody, that harm the canary text
├── SnapshotExists           a snapshot would have replaced a file
├── StoreLocked              another process has the data file open
├── StoreUnavailable         Redis cannot be reached; nobody knows whether a write that was under way happened
├── Fenced                   a worker's lease is over or somebody else's: nothing of its commit was written
├── FellBehind               what comes after the reader's position is no longer in the delta stream
└── StoreRegressed           the store stands before what the reader has seen, or has another history

A backend's own I/O failures (disk full, a broken file system) pass through as the library raised them.
"""


class KeyStoreError(Exception):
    """Anything this package raises for its caller."""


class InvalidConfig(KeyStoreError, ValueError):
    """A setting outside its range; the message says what, what was given, what is allowed."""

    def __init__(self, what: str, given: object, allowed: str) -> None:
        super().__init__(f"{what} is {given!r}; allowed: {allowed}")


class InvalidStatistics(KeyStoreError, ValueError):
    """Statistics that do not fit: a shape, an expert id or a layer the store does not have."""


class NonFiniteStatistics(InvalidStatistics):
    """NaN or infinity among the queries or weights of a window."""


class NonFiniteQueries(KeyStoreError):
    """A search met inner products that are NaN or infinite."""


class KeyVersionUnavailable(KeyStoreError):
    """The version is unknown, thinned away or expired."""


class InvalidExperts(KeyStoreError, ValueError):
    """A group of experts that does not fit: its name, a layer, a shape or values that are not finite."""


class ExpertGroupExists(KeyStoreError):
    """There was an expert group of that name; names never come back."""


class UnknownExpertGroup(KeyStoreError):
    """No expert group has that name."""


class WrongGroupState(KeyStoreError):
    """The expert group is in no state for this: promoting needs a settling one, retiring one that is not."""


class ExpertNotVisible(KeyStoreError):
    """An expert that the version does not have or hides."""


class VersionConflict(KeyStoreError):
    """The latest version of the scope is not the one the caller expected, or the expert pool changed meanwhile."""


class OutOfBounds(KeyStoreError):
    """Keys that are not finite or lie outside the trust region of their anchors."""


class StoreCorrupted(KeyStoreError):
    """Stored bytes that contradict their sizes, their checksum or the audit chain."""


class ModelMismatch(KeyStoreError):
    """The stored keys belong to another model and are never adopted."""


class InvalidSnapshot(KeyStoreError):
    """A snapshot file that contradicts itself or does not fit; the message names the file and the tensor."""


class CanaryFailed(KeyStoreError):
    """The keys would harm everybody: the canary text fares worse with them than the guard allows."""


class SnapshotExists(KeyStoreError):
    """There is a file of that name already; a snapshot replaces nothing."""


class StoreLocked(KeyStoreError):
    """Another process has the data file open."""


class StoreUnavailable(KeyStoreError):
    """Redis cannot be reached or takes no writes. A write that was under way may have happened: read before going on."""


class Fenced(KeyStoreError):
    """The lease that a commit was made under is over; another worker may go on from the last version."""


class FellBehind(KeyStoreError):
    """The delta stream was trimmed past the reader's position: load the heads."""


class StoreRegressed(KeyStoreError):
    """After a restart or a failover the store has lost what a reader has seen: load its heads, publish nothing."""
