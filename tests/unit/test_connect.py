"""How object stores are reached: what an address and the environment make of obstore's stores. No request is made."""

from datetime import timedelta

import pytest
from obstore.store import AzureStore, GCSStore, S3Store

from m2ray.errors import StoreError
from m2ray.storage import connect
from m2ray.storage.address import parse_address

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENDPOINTS:
        monkeypatch.delenv(name, raising=False)


def store_at(url: str) -> S3Store | GCSStore | AzureStore:
    found = connect.connect(parse_address(url))
    assert isinstance(found, S3Store | GCSStore | AzureStore)
    return found


@pytest.mark.parametrize(
    ("endpoint", "is_unsigned"),
    [
        ("", True),  # the provider's own, over TLS
        ("https://store.example.org", True),
        ("http://127.0.0.1:9000", True),
        ("http://localhost", True),
        ("http://[::1]:9000", True),
        ("http://store.example.org:9000", False),  # over plain HTTP only the signature guards the body
        ("http://127.0.0.1.example.org", False),
    ],
)
@pytest.mark.parametrize("named_by", ["url", *ENDPOINTS])
def test_bodies_are_hashed_for_their_signature_over_plain_http_alone(
    monkeypatch: pytest.MonkeyPatch, *, endpoint: str, is_unsigned: bool, named_by: str
) -> None:
    if named_by == "url":
        store = store_at("s3://bucket/run" + (f"?endpoint={endpoint}" if endpoint else ""))
    else:
        monkeypatch.setenv(named_by, endpoint)
        store = store_at("s3://bucket/run")
    assert str(store.config["unsigned_payload"]).lower() == str(is_unsigned).lower()


def test_options_of_the_url_go_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://elsewhere.example.org")
    store = store_at("s3://bucket/a/run?endpoint=http://store.example.org:9000&region=eu-1&virtual_hosted_style=false&skip_signature=true")
    assert (store.config["bucket"], store.config["region"], store.prefix) == ("bucket", "eu-1", "a/run")
    assert (str(store.config["unsigned_payload"]).lower(), str(store.config["skip_signature"]).lower()) == ("false", "true")


@pytest.mark.parametrize(
    "url", ["s3://bucket/run", "gs://bucket/run?skip_signature=true", "az://container/run?account=mine&skip_signature=true"]
)
def test_every_store_repeats_with_growing_pauses_until_a_deadline(url: str) -> None:
    store = store_at(url)
    assert store.prefix == "run"
    retry = store.retry_config
    assert retry is not None
    assert retry["retry_timeout"] == timedelta(seconds=180)
    assert retry["max_retries"] > 180 / retry["backoff"]["max_backoff"].total_seconds(), "the deadline comes first"
    assert retry["backoff"]["init_backoff"] < retry["backoff"]["max_backoff"]
    assert store.client_options is not None
    assert store.client_options["timeout"] == "60s"


def test_google_and_azure_are_reached_as_their_urls_say() -> None:
    google, azure = store_at("gs://bucket/run?skip_signature=true"), store_at("az://container/run?account=mine&skip_signature=true")
    assert isinstance(google, GCSStore)
    assert google.config["bucket"] == "bucket"
    assert isinstance(azure, AzureStore)
    assert (azure.config["account_name"], azure.config["container_name"]) == ("mine", "container")
    assert (
        store_at("az://container/run?account=mine&endpoint=http://127.0.0.1:10000/mine").config["endpoint"] == "http://127.0.0.1:10000/mine"
    )


@pytest.mark.parametrize(
    "endpoint", ["http://me:hunter2@host", "http://host?token=hunter2", "http://host/a?token=hunter2", "http://host#hunter2"]
)
def test_an_endpoint_that_may_hold_a_secret_is_refused_and_not_repeated(endpoint: str) -> None:
    with pytest.raises(StoreError, match="comes with a user, a query or a fragment") as refused:
        parse_address(f"s3://bucket/run?endpoint={endpoint}")
    assert "hunter2" not in str(refused.value)
