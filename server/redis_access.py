"""From settings to Redis. Imports no torch: workers need none."""

from keystore.backends.redis_client import RedisClient, RedisSettings
from keystore.backends.redis_seal import Seal
from server.settings_key_store import KeyStoreSettings

TIMEOUT_S = 2.0  # of one reply; longer than any read waits for news


def open_client(settings: KeyStoreSettings) -> RedisClient:
    """A client that connects when it is first used. Raises OSError when a secret's file cannot be read."""
    assert settings.url is not None, settings
    return RedisClient(
        RedisSettings(
            url=settings.url,
            username=settings.username,
            password=settings.redis_password(),
            tls_ca_file=settings.tls_ca_file,
            tls_cert_file=settings.tls_cert_file,
            tls_key_file=settings.tls_key_file,
            timeout_s=TIMEOUT_S,
        )
    )


def seal_of(settings: KeyStoreSettings) -> Seal:
    """What signs records. Raises OSError when the secret's file cannot be read."""
    return Seal(settings.hmac_key() or b"")
