"""What is computed once and kept: in memory, and on disk in the folder that EQUICONV_CACHE names."""
import io
import os
import tempfile
import weakref
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from zipfile import BadZipFile

import numpy as np

from ..backends import CACHE_FOLDER

FORMAT = 1  # in the name of every file: changes when the meaning of an entry does

_memories = weakref.WeakSet()


class Memory:
    """The most recently used values by key, at most `size` of them. Values must never be written to."""

    def __init__(self, size):
        self.size, self._values, self._lock = size, OrderedDict(), Lock()
        _memories.add(self)

    def get(self, key, build):
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = build()  # not under the lock: two threads may build the same, which does no harm
        with self._lock:
            value = self._values.setdefault(key, value)
            while len(self._values) > self.size:
                self._values.popitem(last=False)
        return value

    def drop(self, key):
        with self._lock:
            self._values.pop(key, None)

    def clear(self):
        with self._lock:
            self._values.clear()

    def __len__(self):
        return len(self._values)


_arrays = Memory(4096)


def remember(key, build):
    """The array of that key: from memory, from disk, or from build(); read-only.

    key    str, a valid file name that says everything the array depends on
    build  function without arguments that returns a float64 array

    An entry on disk that cannot be read is built and written anew; a folder that cannot be written is not used.
    """

    def load():
        array = _read(key)
        if array is None:
            array = np.ascontiguousarray(build(), dtype=np.float64)
            _write(key, array)
        array.setflags(write=False)
        return array

    return _arrays.get(key, load)


def replace(key, array):
    """Makes the array that of the key from now on."""
    _arrays.drop(key)
    _write(key, np.ascontiguousarray(array, dtype=np.float64))


def forget():
    """Empties the caches in memory."""
    for memory in _memories:
        memory.clear()


def _path(key):
    return Path(CACHE_FOLDER) / f"{key}.{FORMAT}.npz"


def _read(key):
    if not CACHE_FOLDER:
        return None
    try:
        with np.load(_path(key), allow_pickle=False) as file:
            return file["array"]  # its checksum is compared
    except (OSError, ValueError, EOFError, KeyError, TypeError, BadZipFile):  # there is none, or it is damaged
        return None


def _write(key, array):
    if not CACHE_FOLDER:
        return
    entry = io.BytesIO()  # NumPy complains of a full disk on stderr, after the error, if it writes there itself
    np.savez(entry, array=array)
    write_file(_path(key).name, entry.getbuffer())


def read_file(name):
    """The bytes that write_file left under that name in the folder, or None."""
    if not CACHE_FOLDER:
        return None
    try:
        return (Path(CACHE_FOLDER) / name).read_bytes()
    except OSError:
        return None


def write_file(name, contents):
    """Writes a file into the folder; does nothing where there is none, or where it cannot be written."""
    if not CACHE_FOLDER:
        return
    temporary = None
    try:
        Path(CACHE_FOLDER).mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=CACHE_FOLDER, suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            file.write(contents)
        os.replace(temporary, Path(CACHE_FOLDER) / name)  # at once, so that no other process reads half of it
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
