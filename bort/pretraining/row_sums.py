"""CRC-32 sums, batch by batch, of the rows that an unfinished build of a teacher cache has left."""

from __future__ import annotations

import os
import zlib
from typing import IO, Any, Callable, Optional, Tuple

from bort.journal import line_of, record_of

SEQUENCES, ROWS = "sequences", "rows_crc32"


def open_no_link(path: str, mode: str) -> IO[Any]:
    """Open a file; a symbolic link in its place is an `OSError`: it would be written through."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


class RowSums:
    """A file beside unfinished rows: for each batch the sequences so far and its rows' CRC-32."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = open_no_link(path, "a+b")

    def append(self, sequences: int, rows: bytes) -> None:
        """Add the batch that ends after so many sequences."""
        self._file.write(line_of({SEQUENCES: sequences, ROWS: zlib.crc32(rows)}))
        self._file.flush()

    def undamaged(
        self, rows: IO[bytes], bytes_until: Callable[[int], int], total: int, batch_size: int
    ) -> int:
        """Return the sequences, in whole batches, whose rows are as they were written.

        The sums of later ones are dropped.

        Args:
            rows: the unfinished rows, at their start.
            bytes_until: the bytes of the rows of the first n sequences.
            total: sequences of the shard.
            batch_size: of this build; an earlier one may have had another.
        """
        self._file.seek(0)
        done = kept = read = end = 0
        for line in self._file:
            sequences, crc32 = _batch_of(line) or (0, 0)
            if not done < sequences <= total:
                break
            content = rows.read(bytes_until(sequences) - bytes_until(done))
            if zlib.crc32(content) != crc32:
                break
            done, read = sequences, read + len(line)
            if done % batch_size == 0 or done == total:
                kept, end = done, read
        self._file.truncate(end)
        return kept

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _batch_of(line: bytes) -> Optional[Tuple[int, int]]:
    """Return the sequences and the CRC-32 of a line, None for a damaged one."""
    try:
        record = record_of(line)
        return int(record[SEQUENCES]), int(record[ROWS])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
