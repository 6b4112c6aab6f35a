"""The pack's one exception. It stands here because the other rooms import from this one and never the other way."""

from __future__ import annotations


class IdentityEditError(ValueError):
    """An input cannot be used; the message says which one and what to do instead."""
