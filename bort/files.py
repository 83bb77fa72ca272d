"""Files and folders: atomic writes, locks, checksums, JSON and YAML."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import resource
import secrets
import shutil
import socket
import stat
import sys
import time
from typing import IO, Any, Iterator, TypeVar

from bort.errors import UserError, escaped, quoted, reasons

Value = TypeVar("Value")

LOCK_FILE = ".lock"
MAX_YAML_BYTES = 1 << 20
# A name of `temporary_name`: the process that writes it, 8 random digits.
_TEMPORARY = re.compile(r"\..+\.(?P<pid>[0-9a-f]{8})[0-9a-f]{8}\.tmp")
_DESCRIPTOR = re.compile(r"/dev/(?:stdout|stderr|fd/(\d+))|/proc/self/fd/(\d+)")
_LEVELS = 2  # of subfolders in which a run writes files: step-0001000/tokenizer/
_COPY_BYTES = 1 << 20
# The largest files that are read as a whole, such as JSON, tokenizers and tables; and those of
# models and checkpoints, which are hashed.
WHOLE_BYTES, MODEL_BYTES = 1 << 30, 1 << 35
OWN_SUM = "content_sha256"  # the key under which a JSON file has the SHA-256 of its other content
_LOCK_POLL = 0.2  # seconds between attempts to get a lock
_COMMA = re.compile(r"(?<!\\),")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Errors of writing to a full disk, beyond a quota, or to a failing disk.
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

# Errors of opening or mapping one file more than this process or the system may have.
_TOO_MANY = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


# ---- writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: str) -> Iterator[str]:
    """Give a new path beside `path`; what is written there becomes `path` when all went well.

    A reader sees the old content or the new one, whole; permissions stay. Symbolic links are
    followed. For writers that take a path; see `atomic_write` for the others.

    Raises `UserError` when `path` is no regular file or the file cannot be written.
    """
    target = os.path.realpath(path)
    _refuse_special_file(path, target)
    temporary = temporary_name(target)
    try:
        yield temporary
        _sync(temporary)
        with contextlib.suppress(OSError):  # FileNotFoundError: it is a new file
            os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
        os.replace(temporary, target)
        _sync(os.path.dirname(target))
    except OSError as error:
        if error.filename in (temporary, None) or error.errno in _WRITE_ERRORS:
            raise UserError(f"{path}: cannot be written ({_reason(error)})") from None
        raise
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that becomes `path` when all went well; text is UTF-8.

    A device or a FIFO is written to as it is: there is nothing to replace.

    Raises `UserError` when `path` is a folder or the file cannot be written.
    """
    encoding = None if "b" in mode else "utf-8"
    if number := _DESCRIPTOR.fullmatch(path):
        # Opened by its name, a file behind it would be cut to nothing, or replaced.
        descriptor = int(number[1] or number[2] or (1 if path.endswith("stdout") else 2))
        sys.stdout.flush()
        with open(os.dup(descriptor), mode, encoding=encoding) as stream:
            yield stream
        return
    if is_stream(path):
        with open(path, mode, encoding=encoding) as stream:
            yield stream
        return
    with atomic_path(path) as temporary:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with open(handle, mode, encoding=encoding) as file:
            yield file


def is_stream(path: str) -> bool:
    """Return whether a path is there and neither a regular file nor a folder: a device, a FIFO.

    What is open already, as /dev/stdout, is one, too.
    """
    if _DESCRIPTOR.fullmatch(path):
        return True
    try:
        kind = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(kind) and not stat.S_ISDIR(kind)


def summary_stream(output: str) -> IO[str]:
    """Return where to print what was written: not on standard output, if that may be `output`."""
    return sys.stderr if is_stream(output) else sys.stdout


def require_place(path: str) -> None:
    """Raise `UserError` when there can be no file of this name.

    Writes nothing: for programs that compute for long before they call `atomic_write`.
    """
    if not is_stream(path):
        _refuse_special_file(path, os.path.realpath(path))


def refuse_overwriting(output: str | None, *inputs: str, flag: str = "--output") -> None:
    """Raise `UserError` when the file to be written is one of those that it is made from.

    flag: the one that named the output, for the message.
    """
    if output is None or is_stream(output):
        return
    for path in inputs:
        with contextlib.suppress(OSError):  # raised where one of them is not there
            if os.path.samefile(output, path):
                raise UserError(
                    f"{flag} {output}: would overwrite what it is made from; name another file"
                )


def _refuse_special_file(path: str, target: str) -> None:
    if os.path.isdir(target):
        raise UserError(f"{path}: is a folder; name a file")
    if is_stream(target):
        raise UserError(f"{path}: is not a regular file; name another one")
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise UserError(f"{path}: there is no folder {folder}; make it first")


def temporary_name(path: str) -> str:
    """Return a new name beside `path` for what is to become it; no two writers share one.

    `lock_folder` removes what stands under such a name when its writer was killed.
    """
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{os.getpid():08x}{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def temporary_folder(folder: str, name: str) -> Iterator[str]:
    """Give a new folder in a folder, for what is made there before it is put in place.

    It is removed at the end; `lock_folder` removes that of a writer that was killed.
    """
    path = temporary_name(os.path.join(folder, name))
    os.mkdir(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def remove_temporaries(folder: str, levels: int = _LEVELS) -> None:
    """Remove what killed writers left in a folder, but not where another process has the lock."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if _is_left_over(entry.name):
                _remove(entry)
            elif levels and _is_unlocked_folder(entry):
                remove_temporaries(entry.path, levels - 1)


def _is_unlocked_folder(entry: os.DirEntry[str]) -> bool:
    is_locked = os.path.lexists(os.path.join(entry.path, LOCK_FILE))
    return entry.is_dir(follow_symlinks=False) and not is_locked


def _is_left_over(name: str) -> bool:
    """Return whether a name is that of a temporary file whose writer does not run here any more."""
    found = _TEMPORARY.fullmatch(name)
    if not found:
        return False
    pid = int(found["pid"], 16)
    # A program that holds no lock may write here too, such as an export into a run's folder.
    return pid == os.getpid() or not os.path.exists(f"/proc/{pid}")


def _remove(entry: os.DirEntry[str]) -> None:
    if entry.is_dir(follow_symlinks=False):
        shutil.rmtree(entry.path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.remove(entry.path)


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in _WRITE_ERRORS:  # another code: no fsync of folders here
            raise
    finally:
        os.close(handle)


def _reason(error: OSError) -> str:
    return error.strerror or reasons(error)[0]


def write_json(path: str, content: Any, with_sum: bool = True) -> None:
    """Write `content` as JSON under `path`, atomically.

    with_sum: an object ends with the SHA-256 of its content, which is verified when it is read;
        False for files of other programs' formats.
    """
    if with_sum and isinstance(content, dict):
        content = {**content, OWN_SUM: json_sha256(content)}
    text = json.dumps(content, indent=2, ensure_ascii=False)
    with atomic_write(path) as handle:
        handle.write(f"{text}\n")


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
    """Give a folder to fill that becomes `path` when all went well, and is removed otherwise.

    So are the folders above it that were made here. What writers of `path` left that were killed is
    removed.

    Raises `UserError` when `path` is there already or cannot be made.
    """
    path = os.path.normpath(path)
    if os.path.lexists(path):
        raise UserError(f"--output {path}: already exists; name a new folder")
    temporary = temporary_name(path)
    parents = _missing_folders(os.path.dirname(path))
    try:
        remove_left_overs_of(path)
        os.makedirs(temporary)
        yield temporary
        os.rename(temporary, path)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({_reason(error)})") from None
    except UserError as error:
        if temporary not in str(error):
            raise
        # The user knows the folder under the name that it was to have.
        raise UserError(str(error).replace(temporary, path)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(parents)


def remove_left_overs_of(path: str) -> None:
    """Remove what killed writers of `path` left beside it.

    For a file or folder that only a user's command writes: where no lock is held, a writer on
    another machine is taken for a killed one.
    """
    folder, name = os.path.split(os.path.realpath(path))
    pattern = re.compile(re.escape(f".{name}.") + r"[0-9a-f]{16}\.tmp")
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if pattern.fullmatch(entry.name) and _is_left_over(entry.name):
                _remove(entry)


def require_writable(folder: str, flag: str) -> None:
    """Raise `UserError` when files cannot be written into a folder, or into a new one there.

    Writes nothing: for programs that load or compute for long before they write.
    """
    path = os.path.abspath(folder)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        raise UserError(f"{flag} {folder}: {path} is not a folder; name another one")
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder}: {path} cannot be written to; name another folder")


# ---- one writer per folder -----------------------------------------------------------------------


@contextlib.contextmanager
def lock_folder(folder: str, flag: str = "") -> Iterator[None]:
    """Make a folder, unless it is there, and keep every other writer out of it.

    The lock is on a file that is open for writing, as NFS requires (flock(2)); it ends with the
    process, however that ends. Temporary files that killed writers left are removed. No empty
    folder that was made here is left behind. `flag` is the one that named the folder, for messages.

    Raises `UserError` when another process holds the lock, which it names, or when the folder
    cannot be made.
    """
    shown = f"{flag} {folder}".strip()
    path = os.path.join(folder, LOCK_FILE)
    new = _missing_folders(folder)
    try:
        os.makedirs(folder, exist_ok=True)
        handle = _locked(path)
    except OSError as error:
        _remove_empty(new)
        raise UserError(f"{shown}: cannot be written ({_reason(error)})") from None
    if handle is None:
        raise UserError(f"{shown}: {_owner(path)} is writing there; wait for it or stop it")
    try:
        remove_temporaries(folder)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.remove(path)
        os.close(handle)
        _remove_empty(new)


def _missing_folders(folder: str) -> list[str]:
    """Return the folders that have to be made for a folder to be there, the deepest first."""
    missing, path = [], os.path.abspath(folder)
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing


def _remove_empty(folders: list[str]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # raised where it is not empty
            os.rmdir(folder)


def has_lock(file: IO[Any], path: str) -> bool:
    """Lock a file that is open for writing; return whether that succeeded and it still is `path`.

    On a file system without locks it does not succeed.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except OSError:
        return False


def _locked(path: str) -> int | None:
    """Return the open and locked file, or None when another process holds the lock."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
                os.close(handle)
                raise
            print(f"warning: {path}: this file system has no locks", file=sys.stderr)
        # The holder before may have removed the file between our two calls.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                os.ftruncate(handle, 0)
                owner = {"pid": os.getpid(), "host": socket.gethostname()}
                os.pwrite(handle, json.dumps(owner).encode(), 0)
                return handle
        os.close(handle)


def _owner(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            owner = json.load(file)
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def await_unlocked(folder: str, seconds: float) -> None:
    """Wait until no process holds the lock of a folder, `seconds` at most."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(UserError), lock_folder(folder):
            return
        time.sleep(_LOCK_POLL)


def open_parents(path: str, top: str) -> None:
    """Open the folders from `top` down to a path that another machine may have written.

    A network file system remembers for half a minute that a file was missing, until its folder is
    opened.
    """
    folder = os.path.abspath(top)
    for name in ["", *os.path.relpath(os.path.dirname(os.path.abspath(path)), folder).split("/")]:
        folder = os.path.join(folder, name)
        with contextlib.suppress(OSError):
            os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))


# ---- reading -------------------------------------------------------------------------------------


def open_regular(path: str | os.PathLike[str], limit: int | None = None) -> IO[bytes]:
    """Open a regular file to be read; a FIFO or a device may never begin, or never end.

    limit: bytes, for what is read or hashed as a whole: a damaged file may claim terabytes.

    Raises `OSError` for anything else and for a larger file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(handle)
    kind = status.st_mode
    if stat.S_ISREG(kind) and (limit is None or status.st_size <= limit):
        return open(handle, "rb")
    os.close(handle)
    if stat.S_ISREG(kind):
        raise OSError(errno.EFBIG, f"it is larger than {limit} bytes, the limit", os.fspath(path))
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))


def walk(folder: str | os.PathLike[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield a folder and those below it as `os.walk` does, in the order of their names.

    Links to folders are followed; each folder comes once, whatever leads to it. Raises `OSError`
    for one that cannot be read, which `os.walk` leaves out.
    """

    def refuse(error: OSError) -> None:
        raise error

    places: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders.sort()
        place = os.path.realpath(parent)
        if place in places:  # by a link, which may lead back
            folders.clear()
            continue
        places.add(place)
        yield parent, folders, names


def listed_names(text: str) -> list[str]:
    r"""Return the names in the value of a flag, separated by commas; `\,` is a comma in a name.

    Blanks around a name do not count, unless something of that very name is there.
    """
    names = (part.replace("\\,", ",") for part in _COMMA.split(text))
    return [name if os.path.lexists(name) else name.strip() for name in names]


def files_named(name: str, folder: str | os.PathLike[str]) -> list[str]:
    """Return the files of a name in a folder and below it, links followed, each once."""
    found: dict[str, str] = {}
    for parent, _, names in walk(folder):
        if name in names:
            path = os.path.join(parent, name)
            found.setdefault(os.path.realpath(path), path)
    return sorted(found.values(), key=lambda path: path.split(os.sep))


def allow_open_files() -> None:
    """Let this process have as many files open as the system allows it: a mapped one stays open.

    By default that is many times the 1,024 with which shells start a program.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # raised where that is more than is possible
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def require_open(path: str, error: Exception) -> None:
    """Raise `UserError` when a file could not be mapped because too many others are."""
    if isinstance(error, OSError) and error.errno in _TOO_MANY:
        raise UserError(
            f"{path}: cannot be opened ({error.strerror}): each shard, or its rows in a teacher "
            "cache, is an open file that is mapped into memory; raise the limits (ulimit -n, "
            "sysctl vm.max_map_count), or make fewer shards by --num_outputs"
        )


def sha256_of(path: str, limit: int | None = None) -> str:
    """Return the SHA-256 of a regular file, in hexadecimal; `limit` as in `open_regular`."""
    digest = hashlib.sha256()
    with open_regular(path, limit) as file:
        try:
            while piece := file.read(_COPY_BYTES):
                digest.update(piece)
        except OSError as error:  # of a failing disk: it does not say of which file
            raise OSError(error.errno, error.strerror, path) from None
    return digest.hexdigest()


def lines_of(path: str) -> list[bytes]:
    """Return the lines of a file with their ends, up to a line that is longer than `WHOLE_BYTES`.

    For files whose damaged end must not stop a run: it may claim terabytes without a line's end.
    """
    lines: list[bytes] = []
    with open_regular(path) as file:
        while line := file.readline(WHOLE_BYTES):
            lines.append(line)
            if not line.endswith(b"\n"):
                break
    return lines


def is_lfs_pointer(path: str) -> bool:
    """Return whether a file is a Git LFS pointer: a clone has those until `git lfs pull`."""
    try:
        with open_regular(path) as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False


def _content(path: str) -> bytes:
    try:
        with open_regular(path, WHOLE_BYTES) as handle:
            return handle.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_reason(error)})") from None


def read_json(path: str, verify: bool = True) -> Any:
    """Read a JSON file; an object that has a SHA-256 of its content is verified, and loses it.

    verify: False for a file that may have been edited.

    Raises `UserError` when the file is missing, not JSON, or altered.
    """
    try:
        content = json.loads(_content(path).decode("utf-8"))
    except RecursionError:
        raise _nested_too_deeply(path) from None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({escaped(str(error))})") from None
    return _without_sum(content, path, verify)


def _without_sum(content: Any, path: str, verify: bool = True) -> Any:
    if not isinstance(content, dict) or OWN_SUM not in content:
        return content  # of an earlier version or another program
    expected = content.pop(OWN_SUM)
    if verify and expected != _json_sha256_of(content, path):
        raise UserError(
            f"{path}: its content is not that of its {OWN_SUM}: damaged, or edited; restore it, "
            "or delete that line and the comma before it to accept the edit"
        )
    return content


def _json_sha256_of(content: object, path: str) -> str:
    try:
        return json_sha256(content)
    except RecursionError:  # writing takes more of the stack than reading
        raise _nested_too_deeply(path) from None


def _nested_too_deeply(where: str) -> UserError:
    return UserError(f"{where}: is not JSON that can be read (nested too deeply)")


def json_sha256(content: object) -> str:
    """Return the SHA-256 of JSON content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_json_as(path: str, expected: type[Value]) -> Value:
    """Read a JSON file into a dataclass, NamedTuple or other annotated type.

    Keys that the type does not have are ignored: a later version may have written them.

    Raises `UserError` as `read_json` does, and naming the key when a value is missing or of
    another type.
    """
    import msgspec

    content = _without_sum(decode_json(_content(path), Any, path), path)
    try:
        return msgspec.convert(content, expected)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: {escaped(str(error))}") from None
    except RecursionError:
        raise _nested_too_deeply(path) from None


def decode_json(content: bytes, expected: Any, where: str) -> Any:
    """Decode JSON into an annotated type; `where` is the file, or file:line, for messages.

    Raises `UserError` when it is not JSON or not of the type.
    """
    import msgspec

    try:
        return msgspec.json.decode(content, type=expected)
    except msgspec.ValidationError as error:
        raise UserError(f"{where}: {escaped(str(error))}") from None
    except RecursionError:
        raise _nested_too_deeply(where) from None
    except (msgspec.DecodeError, ValueError) as error:
        raise UserError(f"{where}: is not JSON ({escaped(str(error))})") from None


def read_yaml(path: str) -> Any:
    """Read a YAML file of plain values.

    Anchors and aliases are refused: a few lines of them expand to gigabytes. So is a key that
    appears twice in one mapping, and a merge key (<<), which may bring one again.

    Raises `UserError` when the file is missing, too large or not such YAML.
    """
    import yaml

    try:
        with open(path, "rb") as handle:  # also of another program: --grid <(command)
            content = handle.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_reason(error)})") from None
    if len(content) > MAX_YAML_BYTES:
        raise UserError(f"{path}: has more than the {MAX_YAML_BYTES} bytes a YAML file may have")
    try:
        return yaml.load(content.decode("utf-8-sig"), _plain_loader())
    except RecursionError:
        raise UserError(f"{path}: is not YAML that can be read (nested too deeply)") from None
    except (yaml.YAMLError, ValueError) as error:
        reason = escaped(" ".join(str(error).split()))
        raise UserError(f"{path}: is not YAML ({reason})") from None


def _plain_loader() -> Any:
    import yaml

    class PlainLoader(yaml.SafeLoader):
        """SafeLoader without aliases and repeated keys."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            """Read the next node; an alias is an error: a few lines could stand for gigabytes."""
            if self.check_event(yaml.AliasEvent):
                line = self.peek_event().start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: aliases (*name) are not allowed")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            """Make a dict; a key that is no string, is there twice or merges is an error."""
            lines: dict[Any, int] = {}
            for key_node, _ in node.value:
                key, line = key_node.value, key_node.start_mark.line + 1
                if not isinstance(key, str):
                    raise yaml.YAMLError(f"line {line}: a key must be a plain value")
                if key_node.tag == "tag:yaml.org,2002:merge":
                    raise yaml.YAMLError(f"line {line}: merge keys (<<) are not allowed")
                if key in lines:
                    raise yaml.YAMLError(
                        f"key {quoted(key)} is on line {lines[key]} and again on line {line}"
                    )
                lines[key] = line
            return super().construct_mapping(node, deep)

    return PlainLoader
