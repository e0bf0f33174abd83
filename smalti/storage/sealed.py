"""JSON documents that notice any change: a digest inside, and one way only to write them."""

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from smalti.errors import CheckpointError


class NewerFormatError(CheckpointError):
    """Whole, but written by a newer smalti."""


def seal(document: Mapping[str, Any]) -> bytes:
    """The document as bytes, with its digest as last entry.

    Raises:
        TypeError: a value that JSON does not have.
    """
    body = dict(document)
    return _dump(body | {"digest": hashlib.sha256(_dump(body)).hexdigest()})


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """Read what `seal` wrote.

    Raises:
        CheckpointError: a bit is not as it was written.
    """
    try:
        body = json.loads(data)
        del body["digest"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where} is damaged or was not written by smalti") from error
    if seal(body) != data:
        raise CheckpointError(f"{where} was changed after it was written: its digest does not fit")
    return body


def check_format(document: Mapping[str, Any], name: str, version: int, where: str) -> None:
    """Refuse a document of another format or of a version that is still to be invented.

    Raises:
        CheckpointError: it is of another format.
        NewerFormatError: it is of a newer version.
    """
    found, found_version = document.get("format"), document.get("version")
    if found != name or not isinstance(found_version, int):
        raise CheckpointError(f"{where} has the format {found!r}, expected {name!r}")
    if found_version > version:
        raise NewerFormatError(
            f"{where} is of format version {found_version}, written by smalti {document.get('smalti')}; this smalti "
            f"reads up to version {version}: update it"
        )


def smalti_version() -> str:
    """The installed version, for what is written into files."""
    try:
        return metadata.version("smalti")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


def _dump(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()
