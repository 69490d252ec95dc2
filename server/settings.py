"""The configuration: command line over `LIBRATION_*` environment over a TOML file over defaults.

Everything is validated here once; unknown keys are an error. Knows nothing of how the values are used.
"""

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from keystore.canary import GuardConfig
from server.settings_endpoint import EndpointSettings
from server.settings_key_store import KeyStoreSettings, WorkerSettings
from server.settings_section import Count, Port, Ratio, Section, read_secret

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
ExpertDetail = Literal["auto", "always", "never"]


class ApiKeyLimits(Section):
    """Whose keys the requests of an API key read and teach, what it may do, and how much of it."""

    tenant: str = Field(default="default", min_length=1, max_length=128, pattern=r"^[^/\s]+$")
    level: Literal["user", "admin"] = "user"
    requests_per_minute: Count | None = None  # None: without limit
    learned_tokens_per_hour: Count | None = None  # None: it may teach without limit
    plasticity: Literal["off", "read", "learn"] | None = (
        None  # of requests that do not say; None: the endpoint's
    )


class ApiKeySettings(ApiKeyLimits):
    """One API key of the configuration. `libration keys api` makes others."""

    key: SecretStr | None = None
    key_file: Path | None = None

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
        return read_secret(self.key_file)


class ServerSettings(Section):
    """Where to listen and whom to let in."""

    host: str = "127.0.0.1"
    port: Port = 8000
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
    prefix_cache_tokens: Annotated[int, Field(ge=0, le=1_000_000_000)] = (
        2048  # of kv_cache_tokens, as long as no request needs them: beginnings of prompts; 0: none
    )
    prefill_chunk: Annotated[int, Field(ge=16, le=8192)] = 256
    step_tokens: Annotated[int, Field(ge=16, le=65_536)] = 512


class FeedbackSettings(Section):
    """How long, and how many, answers are remembered so that they can be judged."""

    keep_s: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 600.0
    keep_answers: Count = 1024  # an answer of several choices counts as often


class MetricsSettings(Section):
    """What the metrics page shows beside what it always does."""

    expert_detail: ExpertDetail = "auto"  # series for every expert; "auto": of up to 1,024 an endpoint
    compat: Literal["vllm"] | None = None  # the most important figures also under vLLM's names


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
    worker: WorkerSettings = WorkerSettings()
    feedback: FeedbackSettings = FeedbackSettings()
    metrics: MetricsSettings = MetricsSettings()
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
