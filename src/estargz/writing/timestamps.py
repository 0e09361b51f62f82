"""Times of a tar that are later than an epoch, set to it, as BuildKit's ``rewrite-timestamp`` does.

BuildKit decodes the tar and encodes it anew; here the fields and records that hold a later time are replaced where they are,
and all the rest stays to the byte. Both give the same times, but for those that Go does not see or keep: of the extended
headers themselves, in global records, and the access and change times of entries whose headers it takes for malformed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from estargz.errors import UsageError, from_status
from estargz.writing.source import PIECE_SIZE, Readable, read_piece

__all__ = ["ClampedTar"]

# status codes (ext/estargz/status.h)
_BAD_CHECKSUM = -30
_BAD_NUMBER = -31
_SPARSE = -32
_BAD_RECORD = -34
_LARGE_HEADER = -35
_TRUNCATED = -36
_LONE_ZERO = -37
_NO_ENTRY = -38

_BLOCK = 512
_META_LIMIT = 1 << 20
_SIZE_LIMIT = 1 << 62

# where the fields of a header lie
_SIZE_AT = 124
_MTIME_AT = 136
_GNU_TIMES_AT = (345, 357)
_STAR_TIMES_AT = (476, 488)
_NUMBER_SIZE = 12
_CHECKSUM = slice(148, 156)
_TYPE = slice(156, 157)

_EXTENDED = (b"x", b"g", b"L", b"K")
_HEADER_ONLY = (b"1", b"2", b"3", b"4", b"5", b"6")
_TIMES = (b"mtime", b"atime", b"ctime")
_NEEDED = (*_TIMES, b"path", b"size")

_DECIMAL = re.compile(rb"([+-]?)0*([0-9]{1,19})")
_RECORD = re.compile(rb"\+?0*([0-9]{1,7}) ([^=\0]+)=")


class ClampedTar:
    """A tar with every modification, access and change time that is later than an epoch set to it.

    All else passes unchanged: other fields and records, payloads, what follows the end of the archive. A tar without later
    times comes out as it went in. Times are changed in every header: those of extended ones, and global records too, which
    Go's readers pass over and others apply to all that follows. Memory holds about 1 MiB and what is asked for at once.

    Args:
        readable: an object whose ``read(size)`` gives the uncompressed tar.
        epoch: seconds since 1970, of 64 bits.

    Raises:
        UsageError: the epoch is out of range.
    """

    def __init__(self, readable: Readable, epoch: int) -> None:
        if not -(2**63) <= epoch < 2**63:
            raise UsageError(f"{epoch} is no time: the upper bound of modification times is a number of seconds")
        self.name = str(getattr(readable, "name", "input"))
        """For messages."""
        self._readable = readable
        self._epoch = epoch
        self._input = bytearray()
        self._offset = 0  # of what was taken from the input
        self._output = bytearray()
        self._pieces = self._clamp()
        self._failure: BaseException | None = None
        self._entry = b""  # the name known best, for messages
        # what extended headers tell of the entry that follows
        self._given: dict[bytes, bytes] = {}
        self._long_name = b""
        self._pending = False

    def read(self, size: int = -1, /) -> bytes:
        """So many bytes, fewer only at the end; all the rest for a negative size.

        Raises:
            TarError: the tar is malformed or truncated, or an entry is a sparse file of GNU's old kind; names entry and byte.
            Whatever the object's own ``read`` raises. An error is raised again by every later call.
        """
        if self._failure is not None:
            raise self._failure
        try:
            while size < 0 or len(self._output) < size:
                self._output += next(self._pieces)
        except StopIteration:
            pass
        except BaseException as error:
            self._failure = error
            raise
        return _cut(self._output, len(self._output) if size < 0 else size)

    def _clamp(self) -> Iterator[bytes]:
        """The whole output, in pieces."""
        zeros = 0
        while zeros < 2 and (block := self._block()):
            if block == bytes(_BLOCK):
                self._expect_nothing_pending()
                zeros += 1
                yield block
            elif zeros:
                raise from_status(_LONE_ZERO, offset=self._offset - _BLOCK)
            else:
                yield from self._headed(block)
        self._expect_nothing_pending()
        while piece := self._some(PIECE_SIZE):
            yield piece

    def _headed(self, block: bytes) -> Iterator[bytes]:
        """A header block and what belongs to it."""
        self._entry, places = _layout(block)
        if not _has_good_checksum(block):
            raise self._error(_BAD_CHECKSUM, _BLOCK)
        kind = block[_TYPE]
        try:
            size = _number(block, _SIZE_AT)
            later = [at for at in places if _number(block, at) > self._epoch]
        except ValueError:
            raise self._error(_BAD_NUMBER, _BLOCK) from None
        if size < 0 and kind not in _HEADER_ONLY:
            raise self._error(_BAD_NUMBER, _BLOCK)
        if kind == b"S":
            raise self._error(_SPARSE, _BLOCK)
        block = _patched(block, dict.fromkeys(later, self._epoch))
        if kind in _EXTENDED:
            return self._extended(block, kind, size)
        return self._payload(block, self._payload_size(kind, size))

    # -------------------------------------------------------------------------------------------- extended headers

    def _extended(self, block: bytes, kind: bytes, size: int) -> Iterator[bytes]:
        """A header that tells something of the next entry, or, if it is a global one, of all that follow."""
        if size > _META_LIMIT:
            raise self._error(_LARGE_HEADER, _BLOCK)
        payload = self._take(size)
        if len(payload) < size:
            raise self._error(_TRUNCATED)
        padding = self._take(-size % _BLOCK)
        self._pending = self._pending or kind != b"g"
        if kind == b"L":
            self._long_name = _text(payload)
        elif kind != b"K":
            clamped, given = self._clamped(payload, size + len(padding))
            if kind == b"x":
                self._given = given
            if clamped != payload:
                block, payload = _patched(block, {_SIZE_AT: len(clamped)}), clamped
                padding = bytes(-len(clamped) % _BLOCK)
        yield block + payload + padding

    def _clamped(self, payload: bytes, behind: int) -> tuple[bytes, dict[bytes, bytes]]:
        """PAX records with their times clamped, and what of them matters here. ``behind``: how many bytes of the input were
        taken since the payload's start."""
        clamped, given = bytearray(), {}
        try:
            for record, key, value in _records(payload):
                if key in _NEEDED:
                    given[key] = value
                clamped += _record(key, b"%d" % self._epoch) if self._is_to_change(key, value) else record
        except ValueError:
            raise self._error(_BAD_RECORD, behind) from None
        return bytes(clamped), given

    def _is_to_change(self, key: bytes, value: bytes) -> bool:
        try:
            return key in _TIMES and _is_later(value, self._epoch)
        except ValueError:
            return False  # an error only if it is the key's last record

    def _payload_size(self, kind: bytes, size: int) -> int:
        """What follows an entry's header, which extended headers may have told."""
        given, self._entry = self._given, self._long_name or self._given.get(b"path") or self._entry
        self._given, self._long_name, self._pending = {}, b"", False
        try:
            for key in _TIMES:
                _is_later(given.get(key, b""), self._epoch)
            if stated := given.get(b"size"):
                size = _decimal(stated)
        except ValueError:
            raise self._error(_BAD_RECORD, _BLOCK) from None
        if kind in _HEADER_ONLY or (kind == b"\0" and self._entry.endswith(b"/")):
            return 0  # whatever the size field says
        if not 0 <= size <= _SIZE_LIMIT:
            raise self._error(_BAD_NUMBER, _BLOCK)
        return size

    def _expect_nothing_pending(self) -> None:
        if self._pending:
            raise self._error(_NO_ENTRY)

    # -------------------------------------------------------------------------------------------------- the input

    def _payload(self, block: bytes, size: int) -> Iterator[bytes]:
        yield block
        left = size
        while left:
            piece = self._some(min(left, PIECE_SIZE))
            if not piece:
                raise self._error(_TRUNCATED)
            left -= len(piece)
            yield piece
        yield self._take(-size % _BLOCK)  # which may be missing where the tar ends

    def _block(self) -> bytes:
        """The next block, nothing at the end."""
        block = self._take(_BLOCK)
        if 0 < len(block) < _BLOCK:
            raise self._error(_TRUNCATED, len(block))
        return block

    def _take(self, size: int) -> bytes:
        """So many bytes of the input, fewer only at its end."""
        while len(self._input) < size and (piece := read_piece(self._readable, PIECE_SIZE, "input")):
            self._input += piece
        taken = _cut(self._input, size)
        self._offset += len(taken)
        return taken

    def _some(self, limit: int) -> bytes:
        """At most so many bytes, without a copy where it can be; nothing at the end."""
        if self._input:
            return self._take(min(limit, len(self._input)))
        piece = read_piece(self._readable, limit, "input")
        self._offset += len(piece)
        return piece

    def _error(self, status: int, back: int = 0) -> BaseException:
        """``back``: how many bytes of the input were taken since the place to name."""
        name = self._entry.decode("utf-8", "backslashreplace") or self.name
        return from_status(status, name=name, offset=self._offset - back)


def _cut(buffer: bytearray, size: int) -> bytes:
    """Takes bytes away from a buffer's start."""
    taken = bytes(memoryview(buffer)[:size])
    del buffer[:size]
    return taken


# --------------------------------------------------------------------------------------------------------------------
# header blocks


def _layout(block: bytes) -> tuple[bytes, list[int]]:
    """An entry's name, and where its times lie."""
    places, prefix = [_MTIME_AT], b""
    if block[257:265] == b"ustar  \0":
        times = [at for at in _GNU_TIMES_AT if block[at]]
        if all(_is_number(block, at) for at in times):
            places += times
        else:  # Go once wrote a prefix there
            prefix = _text(block[345:500])
            prefix = prefix if prefix.isascii() else b""
    elif block[257:263] == b"ustar\0" and block[508:] == b"tar\0":
        places += _STAR_TIMES_AT
        prefix = _text(block[345:476])
    elif block[257:263] == b"ustar\0":
        prefix = _text(block[345:500])
    return (prefix + b"/" if prefix else b"") + _text(block[:100]), places


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _number(block: bytes, at: int, width: int = _NUMBER_SIZE) -> int:
    """Octal digits between blanks, or two's complement below a marker bit. Raises ValueError for what is no number."""
    field = block[at : at + width]
    if field[0] & 0x80:
        bits = 8 * width - 1
        value = (int.from_bytes(field, "big") & (1 << bits) - 1) - ((field[0] & 0x40) << bits - 6)
        if not -(2**63) <= value < 2**63:
            raise ValueError(field)
        return value
    digits = _text(field.strip(b"\0 "))
    if digits.strip(b"01234567"):
        raise ValueError(field)
    return int(digits or b"0", 8)


def _is_number(block: bytes, at: int) -> bool:
    try:
        _number(block, at)
    except ValueError:
        return False
    return True


def _has_good_checksum(block: bytes) -> bool:
    """Old Suns summed signed bytes, so both sums will do."""
    try:
        stated = _number(block, _CHECKSUM.start, 8)
    except ValueError:
        return False
    total = _checksum(block)
    if stated == total:
        return True
    rest = block[: _CHECKSUM.start] + block[_CHECKSUM.stop :]
    return stated == total - 256 * sum(byte >= 0x80 for byte in rest)


def _checksum(block: bytes | bytearray) -> int:
    return sum(block) - sum(block[_CHECKSUM]) + 8 * ord(" ")


def _patched(block: bytes, numbers: dict[int, int]) -> bytes:
    """The block with other numbers at these places, and the checksum that goes with them."""
    if not numbers:
        return block
    patched = bytearray(block)
    for at, number in numbers.items():
        patched[at : at + _NUMBER_SIZE] = _number_field(number)
    patched[_CHECKSUM] = b"%06o\0 " % _checksum(patched)
    return bytes(patched)


def _number_field(number: int) -> bytes:
    """Octal digits; what they cannot hold as GNU tar writes it."""
    if 0 <= number < 1 << 3 * (_NUMBER_SIZE - 1):
        return b"%0*o\0" % (_NUMBER_SIZE - 1, number)
    field = number.to_bytes(_NUMBER_SIZE, "big", signed=True)
    return bytes([field[0] | 0x80]) + field[1:]


# --------------------------------------------------------------------------------------------------------------------
# PAX records


def _records(payload: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Whole records, their keys and values. Raises ValueError for what is none."""
    at = 0
    while at < len(payload):
        match = _RECORD.match(payload, at)
        end = at + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(payload) or payload[end - 1 : end] != b"\n":
            raise ValueError(at)
        yield payload[at:end], match[2], payload[match.end() : end - 1]
        at = end


def _decimal(text: bytes) -> int:
    """Raises ValueError for what is no number, or none of 64 bits."""
    match = _DECIMAL.fullmatch(text)
    number = int(match[1] + match[2]) if match else 2**63
    if not -(2**63) <= number < 2**63:
        raise ValueError(text)
    return number


def _is_later(time: bytes, epoch: int) -> bool:
    """Whether a time, seconds with or without decimals, is later than the epoch; an empty one, which takes the record back,
    is not. Raises ValueError for what is no time."""
    if not time:
        return False
    whole, _, fraction = time.partition(b".")
    seconds = _decimal(whole)
    if fraction.strip(b"0123456789"):
        raise ValueError(time)
    return seconds > epoch or (seconds == epoch and whole[:1] != b"-" and fraction.strip(b"0") != b"")


def _record(key: bytes, value: bytes) -> bytes:
    """The length that a record states counts its own digits."""
    bare = len(key) + len(value) + 3
    length = bare + len(b"%d" % bare)
    return b"%d %s=%s\n" % (bare + len(b"%d" % length), key, value)
