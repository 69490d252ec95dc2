"""The tables `key_store` and `worker`: where learned keys live, and who learns."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, model_validator

from keystore.records import SessionEviction
from server.settings_section import Count, Port, Section, read_secret


class KeyStoreSettings(Section):
    """What the key store keeps, for how long, and where: in files of this server or in a Redis that several share."""

    queue_windows: Count = 256  # with Redis: scopes whose windows wait to be sent
    versions_in_memory: Count = 8
    versions_on_disk: Count = 64
    max_sessions: Count = 1024
    session_eviction: SessionEviction = (
        "save"  # of sessions above max_sessions; "discard": of all servers together
    )
    session_ttl_s: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] = 3600.0
    exact_limit: Count = 16_384  # keys a layer; larger ones are searched through inverted lists

    backend: Literal["embedded", "redis"] = "embedded"
    url: str | None = Field(default=None, pattern=r"^(rediss?|unix)://[^@]*$")  # without a password
    username: str | None = None  # of Redis's ACL
    password: SecretStr | None = None
    password_file: Path | None = None
    tls_ca_file: Path | None = None  # None: the system's; all three only with rediss://
    tls_cert_file: Path | None = None  # of this client, where Redis asks for one
    tls_key_file: Path | None = None
    shards: Annotated[int, Field(ge=1, le=1024)] = 8  # the same for all servers and workers of one Redis
    hmac_secret: SecretStr | None = None  # signs statistics on their way through a shared Redis
    hmac_secret_file: Path | None = None

    @model_validator(mode="after")
    def _fits_the_backend(self) -> "KeyStoreSettings":
        of_redis = {
            "url", "username", "password", "password_file", "tls_ca_file", "tls_cert_file", "tls_key_file",
            "shards", "hmac_secret", "hmac_secret_file",
        } & self.model_fields_set  # fmt: skip
        if self.backend == "embedded" and of_redis:
            raise ValueError(f"{', '.join(sorted(of_redis))}: only with backend = 'redis'")
        if self.backend == "embedded":
            return self
        if self.url is None:
            raise ValueError("backend 'redis' needs url, such as redis://127.0.0.1:6379/0")
        tls = {"tls_ca_file", "tls_cert_file", "tls_key_file"} & self.model_fields_set
        if tls and not self.url.startswith("rediss://"):
            raise ValueError(f"{', '.join(sorted(tls))}: only with a rediss:// url")
        for name in ("password", "hmac_secret"):
            if getattr(self, name) is not None and getattr(self, f"{name}_file") is not None:
                raise ValueError(f"give either {name!r} or '{name}_file'")
        return self

    def redis_password(self) -> str | None:
        """Raises OSError when its file cannot be read."""
        return _secret(self.password, self.password_file)

    def hmac_key(self) -> bytes | None:
        """None: statistics are not signed. Raises OSError when its file cannot be read."""
        secret = _secret(self.hmac_secret, self.hmac_secret_file)
        return None if secret is None else secret.encode()


class WorkerSettings(Section):
    """`libration worker`: where its metrics and health are, and how long a shard stays with a silent worker."""

    host: str = "127.0.0.1"
    port: Port = 9100  # 0: any that is free, printed at the start
    lease_s: Annotated[float, Field(ge=1, le=300, allow_inf_nan=False)] = 5.0


def _secret(given: SecretStr | None, file: Path | None) -> str | None:
    if given is not None:
        return given.get_secret_value()
    return None if file is None else read_secret(file)
