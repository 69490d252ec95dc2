"""The configuration: command line over `LIBRATION_*` environment over a TOML file over defaults.

Everything is validated here once; unknown keys are an error. Knows nothing of how the values are used.
"""

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from keystore.canary import GuardConfig
from keystore.records import GravityConfig, SessionEviction

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Ratio = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]


class Section(BaseModel):
    """A table of the configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ApiKeySettings(Section):
    """One API key: whose keys its requests read and teach, and what it may do."""

    key: SecretStr | None = None
    key_file: Path | None = None
    tenant: str = Field(default="default", min_length=1, max_length=128, pattern=r"^[^/\s]+$")
    level: Literal["user", "admin"] = "user"
    learned_tokens_per_hour: Count | None = None  # None: it may teach without limit

    @model_validator(mode="after")
    def _one_source(self) -> "ApiKeySettings":
        if (self.key is None) == (self.key_file is None):
            raise ValueError("give either 'key' or 'key_file'")
        return self

    def secret(self) -> str:
        """The key itself. Raises OSError when its file cannot be read."""
        if self.key is not None:
            return self.key.get_secret_value()
        assert self.key_file is not None
        return self.key_file.read_text().strip()


class ServerSettings(Section):
    """Where to listen and whom to let in."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    insecure: bool = False  # listen off loopback although there are no API keys
    max_body_bytes: Count = 2 * 1024 * 1024
    drain_timeout_s: Annotated[float, Field(ge=0, le=600, allow_inf_nan=False)] = 25.0
    api_keys: tuple[ApiKeySettings, ...] = ()

    @property
    def on_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class EngineSettings(Section):
    """The engine: numbers, memory, batching."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: str = "cpu"
    threads: Annotated[int, Field(ge=0, le=1024)] = 0  # 0: every processor that this process may use
    max_running: Count = 16
    max_waiting: Count = 64
    kv_cache_tokens: Annotated[int, Field(ge=64, le=1_000_000_000)] = 131_072
    prefill_chunk: Annotated[int, Field(ge=16, le=8192)] = 256
    step_tokens: Annotated[int, Field(ge=16, le=65_536)] = 512


class GravitySettings(Section):
    """Defaults of `keystore.records.GravityConfig`, which also checks the ranges."""

    rule: Literal["literal", "direct", "gradient"] = GravityConfig().rule
    plasticity_rate: float = GravityConfig().plasticity_rate
    bonding_rate: float = GravityConfig().bonding_rate
    usage_threshold: float = GravityConfig().usage_threshold
    decay_rate: float = GravityConfig().decay_rate
    decay_window_tokens: int = GravityConfig().decay_window_tokens
    inertia: Literal["ema", "count", "none"] = GravityConfig().inertia
    usage_halflife_tokens: int = GravityConfig().usage_halflife_tokens
    warmup_tokens: int = GravityConfig().warmup_tokens
    dark_energy: Literal["decay", "decay_to_zero", "repulsion", "none"] = GravityConfig().dark_energy
    repulsion_rate: float = GravityConfig().repulsion_rate
    trust_radius: float = GravityConfig().trust_radius
    global_trust_radius: float = GravityConfig().global_trust_radius
    window_tokens: int = GravityConfig().window_tokens
    credit_clamp: float = GravityConfig().credit_clamp
    credit_candidates: int = GravityConfig().credit_candidates
    settling_warmup_tokens: int = GravityConfig().settling_warmup_tokens
    settling_ridge: float = GravityConfig().settling_ridge
    settling_halflife_tokens: int = GravityConfig().settling_halflife_tokens

    @model_validator(mode="after")
    def _in_range(self) -> "GravitySettings":
        self.config()
        return self

    def config(self) -> GravityConfig:
        return GravityConfig(**self.model_dump())


class KeyStoreSettings(Section):
    """What the key store keeps, and for how long."""

    queue_windows: Count = 256
    versions_in_memory: Count = 8
    versions_on_disk: Count = 64
    max_sessions: Count = 1024
    session_eviction: SessionEviction = "save"  # of sessions above max_sessions
    session_ttl_s: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] = 3600.0
    exact_limit: Count = 16_384  # keys a layer; larger ones are searched through inverted lists


class FeedbackSettings(Section):
    """How long, and how many, answers are remembered so that they can be judged."""

    keep_s: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 600.0
    keep_answers: Count = 1024  # an answer of several choices counts as often


class ValueOffsetsSettings(Section):
    """What a session may add to the experts' outputs, for requests that ask for it. Kept as long as sessions are."""

    enabled: bool = False
    rate: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = (
        0.015  # eta; of the residual stream's length
    )
    bound: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = (
        0.1  # longest offset, of the same length
    )


class GuardSettings(Section):
    """Limits of `keystore.canary.GuardConfig`, and the text that they are measured on."""

    enabled: bool = True
    canary_file: Path | None = None  # UTF-8 text; None: English and Python that come with the interpreter
    max_loss_increase: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = (
        GuardConfig().max_loss_increase
    )
    min_overlap: Ratio = GuardConfig().min_overlap
    tenant_every_versions: Count = GuardConfig().tenant_every_versions

    def config(self) -> GuardConfig:
        return GuardConfig(self.max_loss_increase, self.min_overlap, self.tenant_every_versions)


class EndpointSettings(Section):
    """One served model: which variant, and how its keys move."""

    variant: Literal["dense", "some", "moe", "mom", "fm-moe", "ffn"]
    weights: Path | None = None  # a folder of expert blocks; None: those shipped with Libration
    device: str | None = None  # None: the engine's; endpoints of one device share its base and its batches
    plasticity: Literal["off", "read", "learn"] = "learn"  # what a request gets that does not say
    learn_scope: Literal["tenant", "global"] = (
        "tenant"  # whose keys a request without session_id reads and teaches
    )
    plastic_layers: tuple[int, ...] | None = None  # None: the upper half of the layers that have blocks
    gravity: GravitySettings = GravitySettings()
    value_offsets: ValueOffsetsSettings = ValueOffsetsSettings()

    @model_validator(mode="after")
    def _fits_the_variant(self) -> "EndpointSettings":
        plastic_only = {
            "plasticity",
            "learn_scope",
            "plastic_layers",
            "gravity",
            "value_offsets",
        } & self.model_fields_set
        if self.variant != "some" and plastic_only:
            raise ValueError(
                f"variant {self.variant!r} has no routing keys: leave out {', '.join(sorted(plastic_only))}"
            )
        if self.variant == "dense" and self.weights is not None:
            raise ValueError("variant 'dense' is the base without blocks: leave out weights")
        if self.variant == "ffn" and self.weights is None:
            raise ValueError("variant 'ffn' is a control of the training: name its folder in weights")
        return self


def _default_endpoints() -> dict[str, EndpointSettings]:
    return {
        "some": EndpointSettings(variant="some"),
        "moe": EndpointSettings(variant="moe"),
        "mom": EndpointSettings(variant="mom"),
        "fm-moe": EndpointSettings(variant="fm-moe"),
        "dense": EndpointSettings(variant="dense"),
    }


class Settings(BaseSettings):
    """The whole configuration. Raises pydantic's ValidationError, which names every offending key."""

    model_config = SettingsConfigDict(
        env_prefix="LIBRATION_", env_nested_delimiter="__", extra="forbid", frozen=True
    )

    data_dir: Path = Path(platformdirs.user_data_dir("libration", appauthor=False))
    experts_dir: Path | None = None  # files of experts to add lie here; None: `experts` in data_dir
    server: ServerSettings = ServerSettings()
    engine: EngineSettings = EngineSettings()
    key_store: KeyStoreSettings = KeyStoreSettings()
    feedback: FeedbackSettings = FeedbackSettings()
    guard: GuardSettings = GuardSettings()
    endpoints: dict[Name, EndpointSettings] = Field(default_factory=_default_endpoints, min_length=1)

    @field_validator("data_dir", "experts_dir")
    @classmethod
    def _expand(cls, path: Path | None) -> Path | None:
        return path and path.expanduser().absolute()

    @property
    def experts_folder(self) -> Path:
        return self.experts_dir or self.data_dir / "experts"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        toml = TomlConfigSettingsSource(settings_cls)
        return init_settings, env_settings, toml


def load_settings(config_file: Path | None, **flags: Any) -> Settings:  # the flags are checked by the model
    """Settings from a TOML file and the environment, with `flags` (nested tables) above both.

    Raises FileNotFoundError when a named file is missing.
    """
    if config_file is not None and not config_file.is_file():
        raise FileNotFoundError(f"configuration file not found: {config_file}")

    class FileSettings(Settings):
        model_config = SettingsConfigDict(toml_file=config_file)

    return FileSettings(**flags)
