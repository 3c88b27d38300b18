"""An `.eval` log is a zip archive with a member for each sample. Here members go from one archive to another compressed as
they are: nothing of a transcript is decompressed or parsed, so memory depends on none.

The attributes of `zipfile` that are used for it have no underscore, and no documentation. Inspect uses the same.
"""

import copy
from collections.abc import Iterable
from zipfile import BadZipFile, ZipFile, ZipInfo

CHUNK = 2**20
"""Bytes copied at a time. Ours."""

_LOCAL_HEADER, _SIGNATURE = 30, b"PK\x03\x04"
_DESCRIPTOR = 0x08
"""A flag: the sizes stand behind the data. In a copy they stand before it."""


def sample_member(id: int | str, epoch: int) -> str:
    """As Inspect names it, whatever is in the id."""
    return f"samples/{id}_epoch_{epoch}.json"


def copy_member(source: ZipFile, info: ZipInfo, target: ZipFile, name: str | None = None) -> None:
    """Writes strictly forward, so the target may be a stream. Headers are written anew: a source that was appended to, or has
    its sizes behind its data, does as well."""
    assert source.fp is not None
    assert target.fp is not None
    new = copy.copy(info)
    new.filename = new.orig_filename = name or info.filename
    new.extra, new.flag_bits = b"", info.flag_bits & ~_DESCRIPTOR
    new.header_offset = target.start_dir
    header = new.FileHeader()  # with the sizes, and in zip64 form where they need it
    target.fp.write(header)
    for chunk in _compressed(source, info):
        target.fp.write(chunk)
    target.start_dir += len(header) + info.compress_size
    target.filelist.append(new)
    target.NameToInfo[new.filename] = new


def _compressed(source: ZipFile, info: ZipInfo) -> Iterable[bytes]:
    assert source.fp is not None
    source.fp.seek(info.header_offset)
    header = source.fp.read(_LOCAL_HEADER)
    if header[:4] != _SIGNATURE:
        raise BadZipFile(f"there is no member at {info.header_offset}, where {info.filename!r} should be")
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    source.fp.seek(info.header_offset + _LOCAL_HEADER + name + extra)
    left = info.compress_size
    while left:
        chunk = source.fp.read(min(left, CHUNK))
        if not chunk:
            raise BadZipFile(f"it ends within {info.filename!r}")
        yield chunk
        left -= len(chunk)
