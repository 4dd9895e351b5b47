"""Local disks and object stores behind one small interface."""

from pathlib import Path
from urllib.parse import urlsplit

from m2ray.errors import StoreError
from m2ray.storage.address import SCHEMES, without_secrets
from m2ray.storage.connect import looking
from m2ray.storage.disk_errors import remedy_for
from m2ray.storage.file import StoreFile
from m2ray.storage.local import LocalStore, local_folder, no_empty_folders, with_home
from m2ray.storage.object_store import ObjectStore
from m2ray.storage.scratch import aligned, scratch
from m2ray.storage.store import Data, PartSink, ReadPieces, Store

__all__ = [
    "SCHEMES",
    "Data",
    "LocalStore",
    "ObjectStore",
    "PartSink",
    "ReadPieces",
    "Store",
    "StoreFile",
    "aligned",
    "local_folder",
    "looking",
    "no_empty_folders",
    "open_store",
    "remedy_for",
    "scratch",
    "with_home",
    "without_secrets",
]


def open_store(url: str | Path) -> Store:
    """The store at a local path, a `file://` URL, or an object store's URL such as `s3://bucket/folder`. Nothing is touched yet.

    Credentials of an object store come from the environment and the provider's own chain; so do endpoint and region, unless the
    URL names them: `s3://bucket/folder?endpoint=https://host:9000&region=eu-1`.

    Raises:
        StoreError: the scheme is not one that m2ray uses, or the URL is malformed or holds a secret.
    """
    text = str(url)
    if "\0" in text:
        raise StoreError(f"{without_secrets(text)!r} holds a zero byte, which no path has.", "Check it.")
    folder = local_folder(text)
    if folder is not None:
        return LocalStore(folder)
    scheme = urlsplit(text).scheme
    if scheme not in SCHEMES:
        raise StoreError(
            f"m2ray cannot use {without_secrets(text)!r}: its scheme is {scheme!r}.", f"Give a local path or one of {', '.join(SCHEMES)}."
        )
    return ObjectStore(text)
