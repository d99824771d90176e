"""Replace names by salted hashes. Patient and case names stay on the machine that prepared the shards."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from medsam2.errors import UserError

SALT_VARIABLE = "MEDSAM2_SALT"
HASH_DIGITS = 16


def salt_file() -> Path:
    """The path of this user's salt, outside of any shards."""
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "medsam2" / "salt"


def read_salt() -> bytes:
    """Read the salt from `MEDSAM2_SALT` if set, else from the user's file, created once with mode 0600.

    Raises:
        UserError: the file cannot be created or read, or is empty.
    """
    if variable := os.environ.get(SALT_VARIABLE):
        return variable.encode()
    path = salt_file()
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            # A complete temporary file is linked into place, so that two simultaneous first runs agree on one salt.
            with NamedTemporaryFile("w", dir=path.parent) as file, suppress(FileExistsError):
                file.write(secrets.token_hex(32))
                file.flush()
                os.link(file.name, path)
        salt = path.read_text().strip()
    except OSError as error:
        raise UserError(
            f"{path}: the salt of patient hashes cannot be stored ({error}); set {SALT_VARIABLE}."
        ) from None
    if not salt:
        raise UserError(f"{path}: the salt of patient hashes is empty; remove the file or set {SALT_VARIABLE}.")
    return salt.encode()


def salted_hash(salt: bytes, kind: str, dataset: str, name: str) -> str:
    """Hash a name to 16 hexadecimal digits: the same throughout a dataset, and meaningless without the salt.

    The hash uses the slug of `dataset`, so that a name can be looked up in an index without the source data.
    """
    message = "\x00".join((kind, slug(dataset), name)).encode()
    return hmac.new(salt, message, hashlib.sha256).hexdigest()[:HASH_DIGITS]


def slug(name: str) -> str:
    """A dataset's name for keys and file names: at most 40 letters, digits, `_` and `-`, no dots.

    A changed name ends with four hexadecimal digits of its hash, so that two such names stay distinct.
    """
    clean = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_-")[:40]
    if clean == name:
        return clean
    return f"{clean[:35] or 'dataset'}_{hashlib.sha256(name.encode()).hexdigest()[:4]}"
