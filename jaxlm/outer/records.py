"""What a store holds: sealed records (JSON) and payloads (safetensors), checked when they are read.

A record is {"body", "sha256"} and, where outer.keys is set, {"signer", "signature"}. The hash and
the Ed25519 signature cover the store's identity, the record's own name and the body, so that a
record that is damaged, moved to another name, or copied from another store or round is refused. A
payload's name ends in the SHA-256 of its bytes. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from jaxlm import extras
from jaxlm.config import UserError
from jaxlm.outer.store import Store
from jaxlm.validate_outer import ISLAND_NAME

Body = dict[str, Any]
MERGER = "merger"  # the name in outer.keys of who merges
DIGITS = 12  # of the numbers in names, so that names sort as numbers do
LARGEST_RECORD = 16 << 20  # bytes; a larger one is not parsed
BFLOAT16 = ":bfloat16"  # ends the name of an array that safetensors holds as its 16 bits
NAME = re.compile(ISLAND_NAME)  # of an island


class Damaged(Exception):
    """An object of the store that is torn, altered, misplaced or not signed as it must be."""


# --- names ---------------------------------------------------------------------------------------


def numbered(folder: str, number: int) -> str:
    """The name of a record that has a number: "merges/000000000007.json"."""
    return f"{folder}/{number:0{DIGITS}}.json"


def number_of(name: str) -> int | None:
    """The number in a record's name; None where it has none."""
    found = re.fullmatch(rf"(?:.*/)?(\d{{{DIGITS}}})\.json", name)
    return int(found[1]) if found else None


def numbers(store: Store, folder: str) -> list[int]:
    """The numbers of the records in a folder, increasing."""
    found = (number_of(name) for name in store.list(f"{folder}/"))
    return sorted(number for number in found if number is not None)


# --- signatures ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Identity:
    """Who writes and whom to believe in one store."""

    name: str  # of who writes: an island, or "merger"
    store: str  # hash of the store's about.json; empty: none is known yet
    private: Any = None  # Ed25519PrivateKey; None: nothing is signed
    keys: tuple[tuple[str, str], ...] = ()  # name -> public key, hexadecimal; none: not checked


def load_private_key(file: Path, key: str) -> tuple[Any, str, bool]:
    """(private key, public key in hexadecimal, whether it was made now), of a file of 32 bytes.

    The file is made, readable by its owner only, where it is not there. Raises UserError.
    """
    ed25519 = extras.load("cryptography.hazmat.primitives.asymmetric.ed25519", "sign", key)
    made = False
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            fresh = ed25519.Ed25519PrivateKey.generate().private_bytes_raw().hex()
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as opened:
                opened.write(fresh + "\n")
            made = True
        if stat.S_IMODE(file.stat().st_mode) & 0o077:
            raise UserError(f"{file}: others can read this private key; `chmod 600` it")
        private = ed25519.Ed25519PrivateKey.from_private_bytes(bytes.fromhex(file.read_text()))
    except OSError as error:
        raise UserError(f"{file}: the private key cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file}: not a private key of 64 hexadecimal digits: {error}") from error
    return private, private.public_key().public_bytes_raw().hex(), made


def check_own_key(identity: Identity, public: str, file: Path, key: str = "outer.keys") -> None:
    """Refuse to start with a private key that the others do not know."""
    listed = dict(identity.keys).get(identity.name)
    if listed != public:
        what = (
            f"has another key for {identity.name}" if listed else f"does not name {identity.name}"
        )
        raise UserError(
            f"{key} {what}; {file} is the private key of {identity.name}:{public}: list that"
        )


# --- records -------------------------------------------------------------------------------------


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def seal(identity: Identity, name: str, body: Body) -> bytes:
    """A record's bytes; the same for the same identity, name and body."""
    covered = _canonical([identity.store, name, body])
    record: Body = {"body": body, "sha256": hashlib.sha256(covered).hexdigest()}
    if identity.private is not None:
        record["signer"] = identity.name
        record["signature"] = identity.private.sign(covered).hex()
    return _canonical(record) + b"\n"


def unseal(identity: Identity, name: str, data: bytes, signer: str = "") -> Body:
    """The body of a record that was read as `name`; `signer`: who must have signed (empty: anyone).

    Raises Damaged, saying why.
    """
    if len(data) > LARGEST_RECORD:
        raise Damaged(f"{name}: {len(data)} bytes, too large for a record")
    try:
        record = json.loads(data)
        body, told = record["body"], record["sha256"]
        covered = _canonical([identity.store, name, body])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Damaged(f"{name}: torn: not a whole record") from None
    if not isinstance(body, dict) or hashlib.sha256(covered).hexdigest() != told:
        raise Damaged(f"{name}: altered, or not written for this name in this store")
    if identity.keys:
        _verify(identity, name, record, covered, signer)
    return body


def _verify(identity: Identity, name: str, record: Body, covered: bytes, signer: str) -> None:
    ed25519 = extras.load("cryptography.hazmat.primitives.asymmetric.ed25519", "sign", "outer.keys")
    exceptions = extras.load("cryptography.exceptions", "sign", "outer.keys")
    who = record.get("signer")
    public = dict(identity.keys).get(who) if isinstance(who, str) else None
    if public is None or (signer and who != signer):
        unknown = "not signed" if who is None else f"signed by {who!r}"
        raise Damaged(f"{name}: {unknown}, not by {signer or 'one of outer.keys'}")
    try:
        signature = bytes.fromhex(record["signature"])
        ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(signature, covered)
    except (exceptions.InvalidSignature, ValueError, KeyError, TypeError):
        raise Damaged(f"{name}: its signature is not {who}'s") from None


def create_record(store: Store, identity: Identity, name: str, body: Body) -> bool:
    """Create a record; False where another has that name already."""
    return store.create(name, seal(identity, name, body))


def read_record(store: Store, identity: Identity, name: str, signer: str = "") -> Body:
    """Read a record; KeyError where it is absent, Damaged where it is not sound."""
    return unseal(identity, name, store.read(name), signer)


def digest(data: bytes) -> str:
    """The SHA-256 of bytes, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


# --- payloads ------------------------------------------------------------------------------------


def payload_name(record: str, sha256: str) -> str:
    """Where a payload of a record is: beside no other record's, so that both go together."""
    return f"payloads/{record.removesuffix('.json')}/{sha256}"


def pack(record: str, arrays: dict[str, np.ndarray]) -> bytes:
    """Arrays as safetensors; the record that they belong to is part of the bytes."""
    flat = {}
    for name, array in arrays.items():
        if array.dtype == ml_dtypes.bfloat16:
            name, array = name + BFLOAT16, array.view(np.uint16)
        flat[name] = np.ascontiguousarray(array)
    return safetensors.numpy.save(flat, metadata={"record": record})


def put_payload(store: Store, record: str, data: bytes) -> str:
    """Write a payload of a record; returns its SHA-256."""
    sha256 = digest(data)
    store.write(payload_name(record, sha256), data)
    return sha256


def read_payload(store: Store, record: str, sha256: str) -> dict[str, np.ndarray]:
    """The arrays of a payload of a record; Damaged where it is absent or not what it says."""
    name = payload_name(record, sha256)
    try:
        data = store.read(name)
    except KeyError:
        raise Damaged(f"{name}: absent") from None
    if digest(data) != sha256:
        raise Damaged(f"{name}: altered: its bytes have another hash")
    return unpack(name, data)


def unpack(name: str, data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a payload's bytes; Damaged where they are not safetensors."""
    try:
        flat = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{name}: not sound safetensors: {str(error)[:100]}") from None
    arrays = {}
    for each, array in flat.items():
        if each.endswith(BFLOAT16):
            each, array = each.removesuffix(BFLOAT16), array.view(ml_dtypes.bfloat16)
        arrays[each] = array
    return arrays


def finite(value: float) -> float | None:
    """A number for a record; None where it is not finite, which JSON has no word for."""
    return float(value) if math.isfinite(value) else None
