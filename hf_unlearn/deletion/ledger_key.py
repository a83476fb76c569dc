"""The key of a ledger: message authentication codes of entries, and commitments to rows."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hf_unlearn.data.formats import Row
from hf_unlearn.data.row_identity import row_hash
from hf_unlearn.errors import LedgerError

FORMAT_VERSION = 1
KEY_VARIABLE = "HF_UNLEARN_LEDGER_KEY"
KEY_BYTES = 32
_MAKE_KEY = "python -c 'import secrets; print(secrets.token_hex(32))' > KEYFILE"


@dataclass(frozen=True)
class Commitment:
    """A commitment to a set of rows, which does not reveal them.

    Attributes:
        nonce: Random, so that equal rows of two requests cannot be linked.
        rows: One tag per row, sorted.
        whole: Stands for all of them; the model card shows it.
    """

    nonce: str
    rows: tuple[str, ...]
    whole: str


class LedgerKey:
    """A secret key, and everything that is computed with it.

    >>> key = LedgerKey(bytes(range(32)))
    >>> commitment = key.commit([{"text": "Anna"}, {"text": "Bert"}, {"text": "Anna"}])
    >>> len(commitment.rows), key.tag(commitment.nonce, {"text": "Bert"}) in commitment.rows
    (2, True)

    Args:
        secret: At least `KEY_BYTES` random bytes.

    Raises:
        LedgerError: The secret is too short, or has too few different bytes.
    """

    def __init__(self, secret: bytes):
        if len(secret) < KEY_BYTES or len(set(secret)) < KEY_BYTES // 4:
            raise LedgerError(
                f"the ledger key has {len(secret)} bytes, {len(set(secret))} of them different; it must be at least "
                f"{KEY_BYTES} random bytes, such as: {_MAKE_KEY}"
            )
        self._secret = secret

    def mac(self, purpose: str, *fields: str) -> str:
        """Return the HMAC-SHA256 (RFC 2104) of fields without newlines, in hexadecimal.

        `purpose` separates the uses of the key.
        """
        message = "\n".join((f"hf_unlearn ledger {FORMAT_VERSION}", purpose, *fields))
        return hmac.new(self._secret, message.encode(), hashlib.sha256).hexdigest()

    def matches(self, seen: object, purpose: str, *fields: str) -> bool:
        """Return whether `seen` is the MAC of these fields, in constant time."""
        return hmac.compare_digest(str(seen).encode(), self.mac(purpose, *fields).encode())

    def tag(self, nonce: str, row: Row) -> str:
        """Return the commitment to one row under the nonce of a request."""
        return self.mac("row", nonce, row_hash(row).hex())

    def commit(self, rows: Iterable[Row]) -> Commitment:
        """Commit to raw rows under a new nonce; equal rows count once."""
        nonce = secrets.token_hex(16)
        tags = tuple(sorted({self.tag(nonce, row) for row in rows}))
        return Commitment(nonce, tags, self.mac("request", nonce, *tags))


def read_key(file: str | os.PathLike | None) -> bytes | None:
    """Return the key in `file`, or else in the variable `HF_UNLEARN_LEDGER_KEY`; None if neither has one.

    Whitespace around the key is ignored.

    Raises:
        LedgerError: The file cannot be read or is empty.
    """
    if file is None:
        return os.environ.get(KEY_VARIABLE, "").strip().encode() or None
    try:
        key = Path(file).read_bytes().strip()
    except OSError as error:
        raise LedgerError(f"cannot read the ledger key {file} ({error.strerror}); make one: {_MAKE_KEY}") from error
    if not key:
        raise LedgerError(f"the ledger key {file} is empty; make one: {_MAKE_KEY}")
    return key
