"""How object stores are reached: endpoint, credentials, timeouts, retries.

Credentials come from the environment or the provider's own chain (web identity, container, instance metadata) and stay inside obstore.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from obstore.store import AzureStore, GCSStore, S3Store

from m2ray.storage.address import Address, require_endpoint


class Patience(NamedTuple):
    """How long a server may take: one request, and after the first try of one until its last try begins."""

    request_s: int
    retry_s: int


AT_WORK = Patience(60, 180)
"""Below the five minutes after which a signed request would be refused: a retry has the first request's signature."""

LOOKING = Patience(10, 4)
"""For a person who only looks: an answer within 30 s, of two stores too."""

_PATIENCE: ContextVar[Patience] = ContextVar("patience", default=AT_WORK)
_CONNECT_TIMEOUT_S = 5
_S3_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_OTHER_ENDPOINTS = {"az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"), "gs": ("GOOGLE_BASE_URL",)}
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@contextmanager
def looking() -> Iterator[None]:
    """Stores that are opened here are for a person who only looks: one that cannot be reached is an error within 30 s."""
    token = _PATIENCE.set(LOOKING)
    try:
        yield
    finally:
        _PATIENCE.reset(token)


def patience() -> Patience:
    """That of a store which is opened now."""
    return _PATIENCE.get()


def connect(address: Address) -> Any:
    """The store of obstore for an address. No request is made yet. Raises StoreError for an endpoint of the environment that holds a secret."""
    endpoint = _endpoint(address)
    if endpoint:
        require_endpoint(endpoint)
    for name in _OTHER_ENDPOINTS.get(address.scheme, ()):  # which obstore reads by itself
        if os.environ.get(name):
            require_endpoint(os.environ[name])
    settings: dict[str, Any] = {
        "client_options": {
            "timeout": f"{patience().request_s}s",
            "connect_timeout": f"{_CONNECT_TIMEOUT_S}s",
            "allow_http": urlsplit(endpoint).scheme == "http",
        },
        "retry_config": {
            "max_retries": 1000,  # the deadline ends them
            "retry_timeout": timedelta(seconds=patience().retry_s),
            "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
        },
        "prefix": address.prefix or None,
    }
    options = dict(address.options)
    if "skip_signature" in options:
        settings["skip_signature"] = options["skip_signature"] == "true"
    if address.scheme == "s3":
        return S3Store(address.bucket, **settings, **_s3_settings(options, endpoint))
    if address.scheme == "gs":
        if endpoint:
            settings["base_url"] = endpoint
        return GCSStore(address.bucket, **settings)
    if endpoint:
        settings["endpoint"] = endpoint
    if "account" in options:
        settings["account_name"] = options["account"]
    return AzureStore(address.bucket, **settings)


def _endpoint(address: Address) -> str:
    """The server's URL as the address or, for S3, the environment names it; "" for the provider's own."""
    named = address.options.get("endpoint", "")
    if named or address.scheme != "s3":
        return named
    return next((os.environ[name] for name in _S3_ENDPOINTS if os.environ.get(name)), "")


def _s3_settings(options: dict[str, str], endpoint: str) -> dict[str, Any]:
    """Hashing the body for its signature costs three quarters of the client's time; TLS protects it as well, loopback needs nothing."""
    parts = urlsplit(endpoint)
    settings: dict[str, Any] = {"unsigned_payload": parts.scheme != "http" or parts.hostname in _LOOPBACK}
    if "endpoint" in options:
        # This setting goes before all others: an endpoint in the environment must not win over the URL's.
        settings["aws_endpoint_url_s3"] = options["endpoint"]
    if "region" in options:
        settings["region"] = options["region"]
    if "virtual_hosted_style" in options:
        settings["virtual_hosted_style_request"] = options["virtual_hosted_style"] == "true"
    return settings
