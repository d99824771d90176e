"""Names -> salted hashes. Patient and case names stay on the machine that prepared the shards."""

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
LENGTH = 16


def salt_file() -> Path:
    """Where the salt of this user is kept, outside of any shards."""
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "medsam2" / "salt"


def read_salt() -> bytes:
    """The salt: `MEDSAM2_SALT` if set, else the user's own file, made once with mode 0600.

    Raises:
        UserError: the file cannot be made or read.
    """
    given = os.environ.get(SALT_VARIABLE)
    if given:
        return given.encode()
    path = salt_file()
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            # linked into place whole, so that two first runs at once agree on one salt; the name that it had goes
            with NamedTemporaryFile("w", dir=path.parent) as file, suppress(FileExistsError):
                file.write(secrets.token_hex(32))
                file.flush()
                os.link(file.name, path)
        salt = path.read_text().strip()
    except OSError as error:
        raise UserError(f"{path}: cannot keep the salt of patient hashes ({error}); set {SALT_VARIABLE}.") from None
    if not salt:
        raise UserError(f"{path}: the salt of patient hashes is empty; remove the file or set {SALT_VARIABLE}.")
    return salt.encode()


def salted(salt: bytes, kind: str, dataset: str, name: str) -> str:
    """16 hex digits that stand for a name: equal within a data set, meaningless without the salt.

    `dataset` counts as it stands in the index (`slug`), so that a name can be looked up there without its source.
    """
    message = "\x00".join((kind, slug(dataset), name)).encode()
    return hmac.new(salt, message, hashlib.sha256).hexdigest()[:LENGTH]


def slug(name: str) -> str:
    """A data set's name as it stands in keys and file names: letters, digits, `_` and `-`, at most 40, no dots.

    A name that had to be changed gets four hex digits of its hash, so that two such names do not meet.
    """
    clean = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_-")[:40]
    if clean == name:
        return clean
    return f"{clean[:35] or 'dataset'}_{hashlib.sha256(name.encode()).hexdigest()[:4]}"
