"""A cluster that wants another token is one message at once; everything else is left to Ray."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from models.errors import UserError
from orchestration.training import cluster
from orchestration.training.cluster_token import check_token

RIGHT = "right" * 8
CALLS = {"": "/ray.rpc.NodeInfoGcsService/CheckAlive", "ray://": "/ray.rpc.RayletDriver/ClusterInfo"}


class Guarded(grpc.GenericRpcHandler):
    """Answers one call to those who show the token."""

    def __init__(self, method: str) -> None:
        self.method = method

    def service(self, details):
        if details.method != self.method:
            return None

        def answer(request, context):
            if f"Bearer {RIGHT}" not in dict(context.invocation_metadata()).get("authorization", ""):
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "Invalid or missing authentication token")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture(params=list(CALLS), ids=["head", "client_server"])
def address(request):
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Guarded(CALLS[request.param])])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"{request.param}127.0.0.1:{port}"
    server.stop(None)


@pytest.fixture
def variables(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests of this process may have started one
    return monkeypatch


@pytest.mark.parametrize(
    ("mode", "token", "words"),
    [
        (None, "wrong", "refuses the token"),
        ("token", "wrong", "refuses the token"),
        (None, None, "none here"),
        ("disabled", RIGHT, "none here"),
    ],
)
def test_a_token_that_is_not_the_clusters_is_one_error_within_seconds(address, variables, capfd, mode, token, words):
    for name, value in (("RAY_AUTH_MODE", mode), ("RAY_AUTH_TOKEN", token)):
        if value is not None:
            variables.setenv(name, value)
    started = time.monotonic()
    with pytest.raises(UserError, match=words) as caught:
        cluster.connect(address)
    assert time.monotonic() - started < 5
    assert RIGHT not in str(caught.value)
    assert capfd.readouterr().err == "", "one message, no warnings beside it"


def test_the_right_token_passes_and_a_server_that_says_nothing_is_left_to_ray(address, variables):
    variables.setenv("RAY_AUTH_TOKEN", RIGHT)
    check_token(address)
    variables.delenv("RAY_AUTH_TOKEN")
    for other in ("127.0.0.1:9", "ray://127.0.0.1:9", "a name without a port", "anyscale://x"):
        check_token(other)


def test_auto_is_the_cluster_that_this_machine_belongs_to(variables, tmp_path):
    variables.setenv("RAY_TMPDIR", str(tmp_path))
    check_token("auto")
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Guarded(CALLS[""])])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{port}")
    try:
        with pytest.raises(UserError, match="at auto asks for a token"):
            check_token("auto")
    finally:
        server.stop(None)
