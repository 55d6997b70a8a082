"""The token that a Ray cluster asks for: where it is found, and whether a cluster takes it.

Ray itself tries a token that is refused once a second for 20 seconds, with a warning each time, and a client's connection for 30.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from models.errors import UserError
from models.file_content import expanded

MODE_VARIABLE, TOKEN_VARIABLE, PATH_VARIABLE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
HINT = f"Its token belongs into {TOKEN_VARIABLE} or ~/.ray/auth_token, and {MODE_VARIABLE} must not be `disabled`."
ANSWER_S = 4.0
_LONGEST = 300  # characters of an address

# One call of each kind of server that asks for the token and does nothing.
_CALL_OF_HEAD = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_CALL_OF_CLIENT_SERVER = "/ray.rpc.RayletDriver/ClusterInfo"


def cluster_token() -> str | None:
    """Return the token that Ray shows to clusters, None if it shows none.

    It is looked for where Ray looks: RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, `~/.ray/auth_token`.
    """
    if (os.environ.get(MODE_VARIABLE) or "token").lower() != "token":
        return None
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    file = expanded(os.environ.get(PATH_VARIABLE) or "~/.ray/auth_token")
    if not token and file.is_file():
        token = file.read_text().strip()
    return token or None


def check_address(address: str) -> None:
    """Check that an address can be one of a Ray cluster: Ray would wait for half a minute for what cannot be there.

    Args:
        address: `auto`, `local`, `HOST:PORT`, `ray://HOST[:PORT]` or `http[s]://HOST[:PORT]`.

    Raises:
        UserError: it is none of these.
    """
    if address in ("auto", "local"):
        return
    scheme, separator, place = address.rpartition("://")
    try:
        parts = urlsplit(f"//{place}")
        sound = bool(parts.hostname) and place.isprintable() and " " not in place and len(place) < _LONGEST
        sound = sound and (bool(separator) or parts.port is not None) and (parts.port is None or parts.port > 0)
    except ValueError:
        sound = False
    if not sound or (separator and not scheme.isalnum()):
        raise UserError(
            f"--address (or RAY_ADDRESS) {address[:300]!r} is no address of a Ray cluster: HOST:PORT, ray://HOST:PORT or http://HOST:PORT"
        )


def check_token(address: str) -> None:
    """Ask a cluster once whether it takes the token. One that does not answer is left to Ray, which waits for it.

    Args:
        address: as `ray.init` takes it: `HOST:PORT`, `ray://HOST:PORT` or `auto`.

    Raises:
        UserError: it refuses.
    """
    import grpc

    server = _server(address)
    if server is None or os.environ.get(MODE_VARIABLE, "").lower() not in (
        "",
        "token",
        "disabled",
    ):  # Kubernetes' own way is Ray's business
        return
    token = cluster_token()
    call = _CALL_OF_CLIENT_SERVER if address.startswith("ray://") else _CALL_OF_HEAD
    with grpc.insecure_channel(server) as channel:
        ask = channel.unary_unary(call, request_serializer=bytes, response_deserializer=bytes)
        try:
            ask(b"", timeout=ANSWER_S, metadata=(("authorization", f"Bearer {token}"),) if token else None)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                shown = "refuses the token that is here" if token else "asks for a token, and there is none here"
                raise UserError(f"the Ray cluster at {address} {shown}. {HINT}") from None


def _server(address: str) -> str | None:
    """Return HOST:PORT, None where nothing can be asked."""
    if address == "auto":
        file = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "ray_current_cluster"
        return file.read_text().strip() or None if file.is_file() else None
    parts = urlsplit(address if "://" in address else f"//{address}")
    return parts.netloc if parts.scheme in ("", "ray") and parts.port else None
