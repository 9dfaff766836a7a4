"""A full disk."""

import contextlib

import pytest


@contextlib.contextmanager
def full_disk(room: int):
    """Let a write fail after `room` bytes of a file, as on a full disk (EFBIG in place of ENOSPC)."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
