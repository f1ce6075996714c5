"""API keys: made once, shown once, kept as hashes, compared in constant time.

A key is 256 random bits, so a plain SHA-256 keeps it: salts and slow hashes are for secrets that can be guessed. What
is configured is a line ``label:scope+scope:hash``, from which nobody gets the key back.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Scope = Literal["compress", "segment", "admin"]
SCOPES: tuple[str, ...] = get_args(Scope)
PREFIX = "hsk_"
"""Tells scanners for leaked secrets what a key is."""

_LINE = re.compile(r"(?P<label>[A-Za-z0-9][A-Za-z0-9._-]{0,63}):(?P<scopes>[a-z]+(\+[a-z]+)*):(?P<hash>[0-9a-f]{64})")


@dataclass(frozen=True)
class ApiKey:
    """What is known of a key: whom it was given to, what it may do (``admin`` may do all), and its hash."""

    label: str
    scopes: frozenset[str]
    sha256: str

    def may(self, scope: str) -> bool:
        """Whether the key opens what needs ``scope``."""
        return scope in self.scopes or "admin" in self.scopes

    def line(self) -> str:
        """As it is configured."""
        return f"{self.label}:{'+'.join(sorted(self.scopes))}:{self.sha256}"


def new_key(label: str, scopes: Iterable[str]) -> tuple[str, ApiKey]:
    """A key, which nobody will be able to tell again, and what to configure. Raises ValueError as ``parse_line``."""
    secret = PREFIX + secrets.token_urlsafe(32)
    return secret, parse_line(f"{label}:{'+'.join(sorted(set(scopes)))}:{hash_of(secret)}")


def hash_of(secret: str) -> str:
    """SHA-256 of a key, hexadecimal."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def parse_line(line: str) -> ApiKey:
    """A configured key. Raises ValueError, which does not repeat the line: the key itself may have been put there."""
    found = _LINE.fullmatch(line.strip())
    if found is None:
        raise ValueError("an API key is configured as label:scope+scope:sha256; `hypersam keys new` prints such a line")
    scopes = frozenset(found["scopes"].split("+"))
    if unknown := sorted(scopes - set(SCOPES)):
        raise ValueError(f"unknown scope {', '.join(unknown)}; there are {', '.join(SCOPES)}")
    return ApiKey(found["label"], scopes, found["hash"])


def parse_lines(text: str) -> tuple[ApiKey, ...]:
    """The keys of a file: one a line, empty lines and those that begin with # left out. Raises ValueError with the
    number of the line."""
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                keys.append(parse_line(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    return tuple(keys)


def find_key(keys: Iterable[ApiKey], secret: str) -> ApiKey | None:
    """The key that ``secret`` is. Every hash is compared, each in constant time: how long it takes tells nothing."""
    digest = hash_of(secret)
    found = None
    for key in keys:
        if hmac.compare_digest(key.sha256, digest):
            found = key
    return found
