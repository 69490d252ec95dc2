"""Makes the secrets of a deployment, once: random ones in files that git ignores.

    python deploy/make_secrets.py [FOLDER]

The folder (deploy/secrets) must not exist yet. Redis gets the hashes only, in `users.acl`.
"""

import hashlib
import re
import secrets
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = (
    "admin_api_key",
    "metrics_api_key",
    "redis_server_password",
    "redis_worker_password",
    "hmac_secret",
    "grafana_password",
)


def make_secrets(folder: Path) -> None:
    """Nobody but the owner gets into the folder; within, containers of any user may read what is mounted."""
    folder.mkdir(mode=0o700)
    made = {name: secrets.token_urlsafe(32) for name in NAMES}
    hashed = {name.upper(): hashlib.sha256(value.encode()).hexdigest() for name, value in made.items()}
    users = (HERE / "redis" / "users.acl").read_text()
    made["users.acl"] = re.sub("#([A-Z_]+)", lambda found: f"#{hashed[found[1]]}", users)
    for name, value in made.items():
        path = folder / name
        path.write_text(value)
        path.chmod(0o444)


if __name__ == "__main__":
    make_secrets(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "secrets")
