"""What the key space's and the administration's routes answer, as the API's description tells it."""

from typing import Any, Literal

from typing_extensions import TypedDict


class Drift(TypedDict):
    """Distance from the anchors over the trust radius."""

    max: float
    mean: float


class KeySpace(TypedDict):
    endpoint: str
    scope: str
    version: int
    plasticity: Literal["off", "read", "learn"]
    frozen: bool
    plastic_layers: list[int]
    drift: Drift


class KeySpaceList(TypedDict):
    object: Literal["list"]
    data: list[KeySpace]


class LayerDrift(Drift):
    moved: int


class Layer(TypedDict):
    layer: int
    plastic: bool
    num_experts: int
    drift: LayerDrift
    min_distance: float | None
    tokens: int
    largest_share: float
    entropy_ratio: float | None
    jain_index: float | None


class Canary(TypedDict):
    version: int
    at: float
    passed: bool
    loss_nats: float
    anchors_loss_nats: float
    loss_increase: float
    overlap: float


class KeySpaceDetail(KeySpace):
    versions_kept: int
    checksum: str
    tokens: int
    trust_radius: float
    canary: Canary | None
    layers: list[Layer]


class Load(TypedDict):
    prefill: int
    decode: int


class Neighbour(TypedDict):
    expert: int
    distance: float


class _Expert(TypedDict):
    expert: int
    usage: Load
    share: float
    drift: float
    drift_of_radius: float | None  # null while a new expert settles: no radius holds it
    norm: float
    idle_s: float | None  # since the process last selected it; null: not yet


class ExpertRow(_Expert):
    nearest: Neighbour | None


class LayerExperts(TypedDict):
    endpoint: str
    layer: int
    scope: str
    version: int
    plastic: bool
    num_experts: int
    sort: str
    order: Literal["asc", "desc"]
    offset: int
    experts: list[ExpertRow]


class Peer(TypedDict):
    expert: int
    tokens: int
    share: float  # of the tokens that selected the expert


class Coactivated(TypedDict):
    """Of the newest tokens that the layer routed: how many there are, how many selected the expert, who else worked."""

    window_tokens: int
    tokens: int
    peers: list[Peer]


class PastDrift(TypedDict):
    version: int
    drift: float
    drift_of_radius: float | None  # null while a new expert settles: no radius holds it


class Expert(_Expert):
    endpoint: str
    layer: int
    scope: str
    version: int
    plastic: bool
    nearest: list[Neighbour]
    coactivated: Coactivated
    history: list[PastDrift]


class Projection(TypedDict):
    endpoint: str
    layer: int
    scope: str
    version: int
    explained: float  # share of the anchors' variance that the plane holds
    expert_ids: list[int]
    anchors: list[list[float]]
    keys: list[list[float]]


class Version(TypedDict):
    version: int
    parent: int | None
    created_at: float
    tokens: int
    drift: Drift
    checksum: str
    reason: str


class VersionList(TypedDict):
    object: Literal["list"]
    endpoint: str
    scope: str
    total: int
    data: list[Version]


class UsageMatrix(TypedDict):
    endpoint: str
    phases: list[str]
    layers: list[int]
    num_experts: int
    num_experts_per_tok: int
    counts: list[list[list[int]]]


class FoundExpert(TypedDict):
    expert: int
    score: float
    gate: float


class TokenExperts(TypedDict):
    token_id: int
    text: str
    experts: list[FoundExpert]


class _Searched(TypedDict):
    endpoint: str
    layer: int
    scope: str
    version: int


class FoundExperts(_Searched, total=False):
    """`experts` for a vector, `tokens` for a text."""

    experts: list[FoundExpert]
    tokens: list[TokenExperts]


class Frozen(TypedDict):
    endpoint: str
    scope: str | None
    frozen: bool


class NewVersion(TypedDict):
    endpoint: str
    scope: str
    version: int


class Snapshot(NewVersion):
    name: str
    checksum: str


class PublishedVersion(TypedDict):
    scope: str
    version: int


class Consolidated(TypedDict):
    endpoint: str
    published: list[PublishedVersion]


class AuditTrail(TypedDict):
    object: Literal["list"]
    endpoint: str
    scope: str | None
    verified: int
    data: list[dict[str, Any]]  # Any: JSON, by the kind of event


class ExpertGroup(TypedDict):
    name: str
    scope: str
    state: str
    added_at: float
    digest: str
    expert_ids: dict[str, list[int]]
    settling: dict[str, Any] | None  # Any: lists of numbers, by layer and name


class ExpertGroupOfEndpoint(ExpertGroup):
    endpoint: str


class ExpertGroupList(TypedDict):
    object: Literal["list"]
    endpoint: str
    data: list[ExpertGroup]
