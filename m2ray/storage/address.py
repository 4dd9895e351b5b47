"""Address: what the URL of an object store says. `s3://bucket/folder?endpoint=https://host:9000&region=eu-1`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from m2ray.errors import M2rayError, StoreError, did_you_mean, raise_all

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "s3": ("endpoint", "region", "virtual_hosted_style", "skip_signature"),
    "gs": ("endpoint", "skip_signature"),
    "az": ("account", "endpoint", "skip_signature"),
}
"""What may be named behind the "?", by scheme. All else comes from the environment."""

SCHEMES = tuple(OPTIONS)

_SWITCHES = ("virtual_hosted_style", "skip_signature")
_SECRET = re.compile(r"key|secret|token|password|credential|sas|sig(nature)?$", re.IGNORECASE)
# A prompt glob may hold a "?" of its own: options begin at one that a name and "=" follow.
_URL = re.compile(r"(?P<scheme>[a-z0-9]+)://(?P<bucket>[^/?]*)(?P<prefix>(?:/.*?)?)(?:\?(?P<options>[A-Za-z_-]+=.*))?", re.DOTALL)


@dataclass(frozen=True)
class Address:
    """A prefix of a bucket (for Azure: of a container). Key and prefix are taken as they are written, nothing is unquoted.

    Attributes:
        prefix: without "/" at its ends; "" for the whole bucket.
        options: where and how to reach the store; never a secret.
    """

    scheme: str
    bucket: str
    prefix: str
    options: Mapping[str, str]

    @property
    def name(self) -> str:
        """The URL without its options, for messages."""
        return f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")

    @property
    def url(self) -> str:
        """The whole URL: `parse_address` gives the same address again."""
        return self.name + self.query

    @property
    def query(self) -> str:
        """The options with their "?", or ""."""
        return "?" + "&".join(f"{name}={value}" for name, value in self.options.items()) if self.options else ""


def parse_address(url: str) -> Address:
    """Take an object store's URL apart.

    Raises:
        StoreError: no bucket, an unknown option, or something that looks like a secret, which is not repeated. All at once.
    """
    match = _URL.fullmatch(url)
    if match is None or match["scheme"] not in SCHEMES or not match["bucket"]:
        raise StoreError(f"{without_secrets(url)!r} names no bucket.", "Write for example s3://bucket/folder.")
    if "@" in match["bucket"]:
        raise StoreError(
            f"The URL of bucket {match['bucket'].rpartition('@')[2]!r} holds credentials, which every log would show.",
            "Put them into the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for example.",
        )
    scheme, pairs = match["scheme"], [pair.partition("=") for pair in (match["options"] or "").split("&") if pair]
    problems = [problem for name, _, value in pairs if (problem := _problem(scheme, name, value))]
    raise_all(problems)
    return Address(scheme, match["bucket"], match["prefix"].strip("/"), {name: value for name, _, value in pairs})


def _problem(scheme: str, name: str, value: str) -> M2rayError | None:
    known = OPTIONS[scheme]
    if name in known:
        if not value or (name in _SWITCHES and value not in ("true", "false")):
            return StoreError(f"{name}={value} of an {scheme}:// URL is not {'true or false' if name in _SWITCHES else 'a value'}.")
        if name == "endpoint":
            try:
                require_endpoint(value)
            except StoreError as problem:
                return problem
        return None
    if _SECRET.search(name):
        return StoreError(
            f"An {scheme}:// URL holds {name!r}: credentials do not belong into a URL, which every log would show.",
            "Put them into the environment: AWS_SECRET_ACCESS_KEY, for example.",
        )
    return StoreError(f"An {scheme}:// URL has no option {name!r}.", f"{did_you_mean(name, known)}The options are: {', '.join(known)}.")


def require_endpoint(endpoint: str) -> None:
    """Raise StoreError unless it is the URL of a server and nothing else: a user, a query or a fragment may be credentials, a signature."""
    if re.search(r"[@?#]", endpoint):
        raise StoreError(
            f"The endpoint {without_secrets(endpoint)} comes with a user, a query or a fragment: credentials and signatures do not belong into "
            "a URL, which every log would show.",
            "Write for example https://host:9000, and put credentials into the environment: AWS_SECRET_ACCESS_KEY, for example.",
        )
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", endpoint):
        raise StoreError(f"The endpoint {without_secrets(endpoint)} is no URL of a server.", "Write for example https://host:9000.")


def without_secrets(url: str) -> str:
    """A URL as a message may show it: without user, password, query and fragment."""
    return re.split("[?#]", re.sub(r"//[^/@]*@", "//", url))[0]
