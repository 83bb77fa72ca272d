"""Ways to damage a file: bytes of any format, lines, tables, JSON, YAML and NumPy archives.

Each takes a generator and the content and returns the damaged content; the same seed gives the
same damage.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Optional, Sequence

import numpy as np

Mutator = Callable[[random.Random, bytes], bytes]

LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 9\n"
)
REPLACEMENTS = (
    b"",
    b"\n",
    b"\0" * 100,
    b"\xff" * 100,
    b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n",
    LFS_POINTER,
    "\u00a0\u2003\u00a0\n\u00a0\n".encode(),
    b"\xef\xbb\xbf",
    b"null\n",
    b"[]\n",
    b"{}\n",
    b'"text"\n',
    b"PK\x05\x06" + b"\0" * 18,
)
SCALARS: tuple[Any, ...] = (
    *(None, True, False, "", "x", "1", [], {}, [[]], [None], {"": 0}, "\u00a0", "\ud800"),
    *(-1, 0, 1, 2, 3.5, -0.0, 1e308, -1e308, 1e-320, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**63),
    {"type": "Split", "pattern": {"Regex": "(.*)*(.+.+)+x"}, "behavior": "Isolated", "invert": 0},
    {"type": "Replace", "pattern": {"Regex": "((a{1,1000}){1,1000}){1,1000}"}, "content": "b"},
    *(-(2**31), 10**9, 10**30, "../../etc/passwd", "/etc/passwd", "a/b", ".", "\0", "x" * 5000),
)
INTEGERS = (-1, 0, 1, 2, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, -(2**31), 2**40, 2**62, 2**63 - 1)


# ---- bytes ---------------------------------------------------------------------------------------


def flip_bit(generator: random.Random, content: bytes) -> bytes:
    """Flip one bit."""
    if not content:
        return b"\1"
    place = generator.randrange(len(content))
    return _replaced(content, place, bytes([content[place] ^ 1 << generator.randrange(8)]))


def change_bytes(generator: random.Random, content: bytes) -> bytes:
    """Overwrite one to eight bytes at random."""
    size = min(len(content), generator.randint(1, 8))
    place = generator.randint(0, len(content) - size)
    return _replaced(content, place, generator.randbytes(size) or b"x")


def change_integer(generator: random.Random, content: bytes) -> bytes:
    """Overwrite two, four or eight bytes with a number that headers do not expect."""
    code = generator.choice("Hiq")
    size = struct.calcsize(code)
    place = generator.randint(0, max(0, min(len(content), 4096) - size))
    value = generator.choice(INTEGERS) & (1 << 8 * size) - 1
    return _replaced(content, place, value.to_bytes(size, "little"))


def truncate(generator: random.Random, content: bytes) -> bytes:
    """Keep the beginning."""
    return content[: generator.randint(0, max(0, len(content) - 1))]


def append(generator: random.Random, content: bytes) -> bytes:
    """Add bytes to the end."""
    return content + generator.choice((b"\0", b"\n", b"x", b"\xff\xfe", content[-64:], content))


def cut_out(generator: random.Random, content: bytes) -> bytes:
    """Remove a part."""
    start = generator.randint(0, len(content))
    return content[:start] + content[start + generator.randint(1, 64) :]


def repeat_part(generator: random.Random, content: bytes) -> bytes:
    """Repeat a part."""
    start = generator.randint(0, len(content))
    end = start + generator.randint(1, 64)
    return content[:end] + content[start:end] + content[end:]


def zero_part(generator: random.Random, content: bytes) -> bytes:
    """Overwrite a part with zeros, as a lost block of a disk is read."""
    start, size = generator.randint(0, len(content)), generator.choice((1, 16, 512, 4096))
    return _replaced(content, start, b"\0" * min(size, len(content) - start))


def insert_special(generator: random.Random, content: bytes) -> bytes:
    """Insert bytes that readers of text trip over."""
    special = (b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\r", b"\x85", "\u2028".encode(), b"\t",
               b'"', b"\n\n", b"\x1b", "\U0001f600".encode(), b"\xef\xbb\xbf")  # fmt: skip
    place = generator.randint(0, len(content))
    return content[:place] + generator.choice(special) + content[place:]


def replace_all(generator: random.Random, content: bytes) -> bytes:
    """Put something else in place of everything."""
    return generator.choice((*REPLACEMENTS, gzip.compress(content, mtime=0)))


def _replaced(content: bytes, place: int, piece: bytes) -> bytes:
    return content[:place] + piece + content[place + len(piece) :]


BYTES: tuple[Mutator, ...] = (
    *(flip_bit, flip_bit, flip_bit, change_bytes, change_integer, truncate, append),
    *(cut_out, repeat_part, zero_part, insert_special, replace_all),
)


# ---- lines and tables ----------------------------------------------------------------------------


def change_lines(generator: random.Random, content: bytes) -> bytes:
    """Remove, repeat, exchange, empty or lengthen a line."""
    lines = content.split(b"\n")
    one, other = generator.randrange(len(lines)), generator.randrange(len(lines))
    way = generator.randrange(6)
    if way == 0:
        del lines[one]
    elif way == 1:
        lines.insert(other, lines[one])
    elif way == 2:
        lines[one], lines[other] = lines[other], lines[one]
    elif way == 3:
        lines[one] = generator.choice((b"", b" ", "\u00a0".encode(), b"\t\t\t", b"{}", b"null"))
    elif way == 4:
        lines[one] = lines[one] * 2
    else:
        lines[one] += b" word" * 50_000
    return b"\n".join(lines)


def change_cell(generator: random.Random, content: bytes) -> bytes:
    """Change one cell of a table, or the number of cells of a row."""
    lines = content.split(b"\n")
    place = generator.randrange(len(lines))
    separator = b"\t" if b"\t" in content else b","
    cells = lines[place].split(separator)
    column = generator.randrange(len(cells))
    way = generator.randrange(3)
    if way == 0:
        del cells[column]
    elif way == 1:
        cells.insert(column, b"x")
    else:
        cells[column] = _plain(generator.choice(SCALARS)).encode("utf-8", "surrogatepass")
    lines[place] = separator.join(cells)
    return b"\n".join(lines)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# ---- JSON ----------------------------------------------------------------------------------------


def change_json(generator: random.Random, content: bytes) -> bytes:
    """Change one value or key of a JSON file, or of one line of JSON lines."""
    try:
        return _changed_json(generator, content)
    except ValueError:
        lines = content.split(b"\n")
        place = generator.randrange(len(lines))
        try:
            lines[place] = _changed_json(generator, lines[place]).replace(b"\n", b" ")
        except ValueError:
            return flip_bit(generator, content)
        return b"\n".join(lines)


def _changed_json(generator: random.Random, content: bytes) -> bytes:
    root = [json.loads(content)]
    places = list(_places(root))
    holder, key = generator.choice(places)
    way = generator.randrange(8)
    value = generator.choice(SCALARS)
    if way == 0 and holder is not root:
        del holder[key]
    elif way == 1 and isinstance(holder, dict):
        holder[generator.choice(("unknown", "", "\u00e9", "0"))] = value
    elif way == 2 and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif way == 3:
        other_holder, other_key = generator.choice(places)
        holder[key] = json.loads(json.dumps(other_holder[other_key]))
    elif way == 4:
        return _spliced(root, holder, key, generator.choice(_RAW_VALUES))
    else:
        holder[key] = value
    return json.dumps(root[0], indent=generator.choice((None, 2))).encode()


# What JSON's own writers do not write.
_RAW_VALUES = ("NaN", "-Infinity", "9" * 5000, "[" * 100_000, "1e99999", '{"a": 1, "a": 2}', "+1",
               "[" * 3000 + "]" * 3000, "'text'")  # fmt: skip
_MARK = "b0rt mark"


def _spliced(root: List[Any], holder: Any, key: Any, raw: str) -> bytes:
    holder[key] = _MARK
    return json.dumps(root[0]).replace(f'"{_MARK}"', raw).encode()


def _places(root: Any) -> Any:
    keys = root.keys() if isinstance(root, dict) else range(len(root))
    for key in keys:
        yield root, key
        if isinstance(root[key], (dict, list)):
            yield from _places(root[key])


# ---- YAML ----------------------------------------------------------------------------------------

_YAML = (
    "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n"
              for i in range(8)),
    "".join(f"{name}: [{', '.join(str(1e-6 * (i + 1)) for i in range(59))}]\n"
            for name in ("lr", "weight_decay", "dropout", "warmup_ratio", "epochs", "batch_size")),
    "lr: [1e-4, .nan, .inf]\n",
    "lr: !!python/object/apply:os.system ['true']\n",
    "lr: {a: 1}\n",
    "? [lr]\n: [1]\n",
    "lr: [2001-01-01]\n",
    "lr: [1]\nlr: [2]\n",
    "lr: [99999999999999999999999999999999999]\n",
    "lr: " + "[" * 5000 + "\n",
    "layers: [1]\nheads: [1]\nhidden: [1000000000]\nintermediate: [2147483648]\n",
    "layers: [" + ", ".join(map(str, range(1, 2000))) + "]\nheads: [1, 2]\nhidden: [2, 4]\n"
    "intermediate: [1, 2, 3, 4]\n",
    "architectures: [bort_2147483648_1_1_1]\n",
    "architectures: [bort_1_1_1_1" + ", bort_1_1_1_1" * 50 + "]\n",
    "--- a\n--- b\n",
    "lr: [1e-4,\n",
    "\tlr: [1]\n",
    "%YAML 9.9\n---\nlr: [1]\n",
    "lr: [!!binary aGVsbG8=]\n",
    "lr: [0x10, 0o7, 1_000, 12:30:45]\n",
)  # fmt: skip


def change_yaml(generator: random.Random, content: bytes) -> bytes:
    """Put hostile YAML in place of a file, behind it, or a value in place of one of its own."""
    way = generator.randrange(3)
    if way == 0:
        return generator.choice(_YAML).encode()
    if way == 1:
        return content + generator.choice(_YAML).encode()
    value = generator.choice(
        (*map(_plain, SCALARS), "&a [*a]", "{a: 1}", ".nan", "- 1", "9" * 5000)
    )
    lines = content.decode("utf-8", "replace").split("\n")
    place = generator.randrange(len(lines))
    name, colon, _ = lines[place].partition(":")
    lines[place] = f"{name}{colon} {generator.choice((value, f'[{value}]'))}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


# ---- NumPy archives ------------------------------------------------------------------------------


def change_arrays(generator: random.Random, content: bytes) -> bytes:
    """Change a value, the type, the length or the name of one array of an .npz or .npy file."""
    try:
        loaded = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, OSError):
        return flip_bit(generator, content)
    if isinstance(loaded, np.ndarray):
        return _saved(np.save, _changed_array(generator, loaded))
    arrays = {name: loaded[name] for name in loaded.files}
    name = generator.choice(sorted(arrays))
    way = generator.randrange(4)
    if way == 0:
        del arrays[name]
    elif way == 1:
        arrays["another"] = arrays[name]
    else:
        arrays[name] = _changed_array(generator, arrays[name])
    return _saved(np.savez, **arrays)


def _changed_array(generator: random.Random, array: np.ndarray) -> np.ndarray:
    way = generator.randrange(5)
    if way == 0:
        return array[: generator.randint(0, len(array))] if array.ndim else array.reshape(1)
    if way == 1:
        return array.astype(generator.choice(("f4", "i8", "u1", "f8", "U3", "complex64", "bool")))
    if way == 2:
        return array.reshape(generator.choice(((-1, 1), (1, -1), (-1,))))
    if way == 3:  # a pickle: never loaded
        return np.array([{"a": 1}] * min(3, max(1, array.size)), dtype=object)
    changed = array.copy()
    if changed.size:
        value: Any = generator.choice((*INTEGERS, 1e30, np.nan, np.inf))
        if changed.dtype.kind in "iu":
            high, low = np.iinfo(changed.dtype).max, np.iinfo(changed.dtype).min
            value = int(min(max(value, low), high)) if np.isfinite(value) else high
        changed.reshape(-1)[generator.randrange(changed.size)] = value
    return changed


def _saved(write: Any, *arrays: Any, **named: Any) -> bytes:
    buffer = io.BytesIO()
    write(buffer, *arrays, **named)
    return buffer.getvalue()


# ---- files ---------------------------------------------------------------------------------------


def make_missing(path: Path) -> None:
    """Remove the file."""
    path.unlink()


def make_folder(path: Path) -> None:
    """Put a folder in place of the file."""
    path.unlink()
    path.mkdir()


def make_dangling(path: Path) -> None:
    """Put a link that leads nowhere in place of the file."""
    path.unlink()
    path.symlink_to("nowhere")


def make_loop(path: Path) -> None:
    """Put a link to itself in place of the file."""
    path.unlink()
    path.symlink_to(path.name)


FILES = (make_missing, make_folder, make_dangling, make_loop)

_BY_SUFFIX: dict[str, Sequence[Mutator]] = {
    ".json": (change_json,) * 12,
    ".jsonl": (change_json,) * 8 + (change_lines,) * 3,
    ".yaml": (change_yaml,) * 12,
    ".npz": (change_arrays,) * 8,
    ".npy": (change_arrays,) * 8,
    ".tsv": (change_lines,) * 3 + (change_cell,) * 6,
    ".csv": (change_lines,) * 3 + (change_cell,) * 6,
    ".txt": (change_lines,) * 5 + (change_json,) * 4,
    ".vocab": (change_json,) * 8,
    ".params": (change_integer,) * 6,
    ".safetensors": (change_integer,) * 4,
    ".onnx": (change_integer,) * 4,
}


class Damage(NamedTuple):
    """What was done: `kind` is the mutator's name, `file` the path within the sample."""

    kind: str
    file: str


def damage(generator: random.Random, path: Path, folder: Path) -> Damage:
    """Damage one file of a sample in place."""
    name = str(path.relative_to(folder))
    if generator.random() < 0.02:
        change: Any = generator.choice(FILES)
        change(path)
        return Damage(change.__name__, name)
    content = changed = path.read_bytes()
    while changed == content:
        change = generator.choice((*BYTES, *_BY_SUFFIX.get(path.suffix, ())))
        changed = change(generator, content)
    path.write_bytes(changed)
    return Damage(change.__name__, name)


def flip_one_bit(generator: random.Random, path: Path, folder: Path) -> Damage:
    """Flip one bit of a file of a sample in place."""
    path.write_bytes(flip_bit(generator, path.read_bytes()))
    return Damage(flip_bit.__name__, str(path.relative_to(folder)))


def restore(path: Path, original: Path) -> None:
    """Put the file back as it is in the sample."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
    shutil.copyfile(original, path)


def content_of(path: Path) -> Optional[bytes]:
    """Return the bytes of a regular file, None for what is none."""
    return path.read_bytes() if path.is_file() else None
