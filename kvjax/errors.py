"""Errors that users meet. Each names the argument and the two things that disagree."""

from __future__ import annotations


class KvjaxError(Exception):
    """Base of all errors that kvjax raises on purpose; the command line prints it in one line."""


class CacheError(KvjaxError, ValueError):
    """A cache was asked for what it cannot hold: capacity, rows, a rewind beyond what it kept."""


class InputError(KvjaxError, ValueError):
    """An argument has a wrong shape, dtype or value."""


class CheckpointError(KvjaxError):
    """A checkpoint is missing, damaged, or does not describe a model that kvjax can build."""


__all__ = ["KvjaxError", "CacheError", "InputError", "CheckpointError"]
