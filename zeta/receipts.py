"""Receipts of jobs: reading them, and verifying that a folder contains the model that a receipt is about.

`verify` needs no server: the public key of the installation (`zeta receipt --key`), the receipt and the folder suffice.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from pydantic import ValidationError

from zeta.errors import parse_response
from zeta.transport import HttpTransport
from zeta_core.contract.errors import InvalidRequest, ZetaError
from zeta_core.contract.receipt import Receipt, ReceiptKey, Training, key_id, parse_payload, signed_bytes
from zeta_core.contract.wire.run_directory import TRAINING_STATE_NAME
from zeta_core.system.file_hash import file_sha256

MAX_RECEIPT_BYTES = 64 * 2**20


class InvalidReceipt(ZetaError):
    """The receipt is damaged, or its signature is not one of the given key."""

    type = "receipt_error"
    code = "invalid_receipt"


@dataclass(frozen=True)
class Verification:
    """The result of comparing a folder with a receipt. Paths are relative to the folder.

    ``differences`` maps each file that doesn't match to what is wrong. ``extra`` files are in the folder and not in the
    receipt. ``num_verified`` files match. ``omitted`` is the training state, which a download may leave out.
    """

    training: Training
    num_verified: int
    differences: dict[str, str]
    extra: list[str]
    omitted: list[str]

    @property
    def is_valid(self) -> bool:
        return not self.differences and not self.extra


class Receipts:
    """Each method calls one route of the API."""

    def __init__(self, transport: HttpTransport) -> None:
        self._transport = transport

    def get(self, job_id: str) -> Receipt:
        """The receipt of an ended job. Raises `NotFound` and `Conflict`."""
        path = f"/v1/jobs/{quote(job_id, safe='')}/receipt"
        return parse_response(Receipt, self._transport.request("GET", path))

    def key(self) -> ReceiptKey:
        """The public key of the installation."""
        return parse_response(ReceiptKey, self._transport.request("GET", "/v1/receipt-key"))


def read_receipt(file: Path) -> Receipt:
    """The receipt in a file. Raises `InvalidRequest` and `InvalidReceipt`."""
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_RECEIPT_BYTES)
    except OSError as error:
        raise InvalidRequest(
            f"{str(file)!r} cannot be read: {error.strerror}; `zeta receipt JOB > FILE` writes a receipt.",
            param="RECEIPT",
        ) from error
    try:
        return Receipt.model_validate_json(content)
    except ValidationError as error:
        raise InvalidReceipt(f"{str(file)!r} is not a receipt; `zeta receipt JOB > FILE` writes one.") from error


def verify(receipt: Receipt, public_key_pem: str, folder: Path) -> Verification:
    """Check the signature of a receipt, and compare the files in ``folder`` with it.

    Raises `InvalidReceipt` if the signature is invalid, and `InvalidRequest` for an invalid key or folder.
    """
    training, digests = _verified_statement(receipt, public_key_pem)
    if not folder.is_dir():
        raise InvalidRequest(f"{str(folder)!r} is not a folder; give the folder of the downloaded model.", param="DIR")
    differences: dict[str, str] = {}
    omitted: list[str] = []
    num_verified = 0
    for name, sha256 in digests.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            if name.startswith(f"{TRAINING_STATE_NAME}/"):
                omitted.append(name)
            else:
                differences[name] = "missing"
            continue
        try:
            found = file_sha256(path)
        except OSError as error:
            differences[name] = f"cannot be read ({error.strerror})"
            continue
        if found == sha256:
            num_verified += 1
        else:
            differences[name] = f"SHA-256 is {found}, the receipt has {sha256}"
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()}
    return Verification(training, num_verified, differences, sorted(present - digests.keys()), omitted)


def _verified_statement(receipt: Receipt, public_key_pem: str) -> tuple[Training, dict[str, str]]:
    """The predicate, and the SHA-256 of each file by its path, after checking the signature."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(public_key_pem.encode())
    except ValueError as error:
        raise InvalidRequest("The key is not a public key in PEM format; see `zeta receipt --key`.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidRequest("The key is not an Ed25519 key; see `zeta receipt --key`.")
    own_id = key_id(key.public_bytes_raw())
    signature = next((signature for signature in receipt.signatures if signature.keyid == own_id), None)
    if signature is None:
        ids = ", ".join(signature.keyid for signature in receipt.signatures) or "none"
        raise InvalidReceipt(f"The receipt is signed with another key ({ids}); the given key is {own_id}.")
    try:
        payload = base64.b64decode(receipt.payload, validate=True)
        key.verify(base64.b64decode(signature.sig, validate=True), signed_bytes(receipt.payload_type, payload))
    except (InvalidSignature, ValueError) as error:
        raise InvalidReceipt("The signature of the receipt is invalid: the receipt was changed.") from error
    try:
        _, statement = parse_payload(receipt)
    except ValueError as error:
        raise InvalidReceipt("The signed content is not a statement about a training.") from error
    return statement.predicate, {subject.name: subject.digest.get("sha256", "") for subject in statement.subject}
