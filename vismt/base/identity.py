"""What a number belongs to: the identity of models, data and code, as a 128-bit digest (XXH3) of all that they consist of.

A model consists of the values of all its tensors, the settings of its modules (every attribute that is not a tensor), its hooks,
and the code of its classes. The code of a library's class or function is the version of the library, and own functions in the
place of its methods. The code of an own class or function is its source file, with the defaults and the closure of a function.
Our own package is versioned by its source files.

What has no readable content (an open file, a generator, code without a source) has no identity: `unknown` names it, and a caller
computes again. Not seen: modules that own code imports; functions of a module that are replaced as the program runs; what C code
keeps; files that code reads as it runs.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import io
import logging
import os
import pickle
import sys
import sysconfig
import threading
import types
import weakref
from collections import deque
from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_CONTAINERS = (dict, list, tuple, set, frozenset)
NO_CONTENT = (logging.Logger, type(threading.Lock()), type(threading.RLock()))  # no number depends on them
OF_MODULE = frozenset(vars(nn.Module()))
# `training` is the caller's choice. Adapted models write merged files, by a function of the model.
NO_NUMBER = OF_MODULE | {"save_pretrained"}
_HOOKS = tuple(name for name in sorted(OF_MODULE) if name.endswith("_hooks"))
PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARIES = tuple(
    {str(PACKAGE), *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))}
)


class Identity:
    """The identity of values together; `str` gives its 32 hexadecimal digits.

    Args:
        values: models, functions, tensors, images, arrays, plain values, other identities, and containers and objects of these.
        skip: modules that do not compute.

    Attributes:
        unknown: what has no readable content, None where all is known. The digest then identifies nothing.
        foreign: code that is not of a library, or a function that replaces a module's method, None where there is none.
    """

    def __init__(self, *values: Any, skip: Collection[nn.Module] = ()) -> None:
        self.unknown: str | None = None
        self.foreign: str | None = None
        self._hash = xxhash.xxh3_128()
        self._seen: dict[int, tuple[int, Any]] = {}  # the values are kept: their ids stay theirs
        self._skip = {id(module) for module in skip}
        try:
            for value in values:
                self._add(value)
        except RecursionError:
            self.unknown = "objects nested too deeply"

    def __str__(self) -> str:
        return self._hash.hexdigest()

    def _put(self, *texts: object) -> None:
        line = "\0".join(map(str, texts)).encode(errors="surrogatepass")
        self._hash.update(b"%d:%b" % (len(line), line))

    def _each(self, what: str, *values: Any) -> None:
        self._put(what, len(values))
        for value in values:
            self._add(value)

    def _add(self, value: Any) -> None:
        """Add a value; one that was added before, as its number."""
        if type(value) in _PLAIN:
            self._put(type(value).__name__, repr(value))
        elif id(value) in self._seen:
            self._put("again", self._seen[id(value)][0])
        elif id(value) not in self._skip:
            self._seen[id(value)] = len(self._seen), value
            _adder(value.__class__)(self, value)

    # ---- values -------------------------------------------------------------------------------------------------------

    def _identity(self, value: Identity) -> None:
        self._put("identity", value)
        self.unknown, self.foreign = self.unknown or value.unknown, self.foreign or value.foreign

    def _tensor(self, value: Tensor) -> None:
        self._put("tensor", value.dtype, tuple(value.shape))
        if hasattr(value, "__tensor_flatten__"):
            names, about = value.__tensor_flatten__()
            self._each(type(value).__name__, *(getattr(value, name) for name in names), about)
        elif value.layout != torch.strided or value.is_quantized:
            self.unknown = self.unknown or f"a tensor of layout {value.layout}"
        elif not value.is_meta:
            plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
            self._hash.update(plain.flatten().view(torch.uint8).numpy().data)
            if type(value) not in (Tensor, nn.Parameter, nn.Buffer):  # such as packed weights with their scales
                self._add(dict(vars(value)))

    def _module(self, module: nn.Module) -> None:
        state = vars(module)
        settings = {name: value for name, value in state.items() if name not in NO_NUMBER}
        for name, value in settings.items():
            if callable(value) and callable(getattr(type(module), name, None)):
                self.foreign = self.foreign or f"{type(module).__name__}.{name}"
        # Without the numbers by which torch finds them.
        hooks = {name: list(state[name].values()) for name in _HOOKS if state[name]}
        self._each("module", type(module), settings, hooks)
        for kind in ("_parameters", "_buffers", "_modules"):
            self._each(kind, *(part for pair in state[kind].items() for part in pair))

    def _array(self, value: Any) -> None:
        """Add an array or a number of NumPy, or an image of Pillow."""
        if hasattr(value, "getexif"):
            turned = value.getexif().get(0x0112)  # EXIF orientation
            self._put("image", value.mode, value.size, value.getpalette(), repr(value.info.get("transparency")), turned)
        else:
            self._put("array", value.dtype, value.shape)
            if value.dtype.hasobject:
                self._each("items", *value.ravel().tolist())
                return
        self._hash.update(value.tobytes())

    def _object(self, value: Any) -> None:
        """Add a container, an array or another object: its type, its items and its attributes."""
        self._put("object", type(value).__qualname__)
        if hasattr(value, "tobytes") and (hasattr(value, "dtype") or hasattr(value, "getexif")):
            self._array(value)
            return
        state: dict[str, Any] = {}
        if type(value) not in _CONTAINERS:
            self._add(type(value))
            state |= getattr(value, "__dict__", {})
            for base in type(value).__mro__:
                slots = base.__dict__.get("__slots__", ())
                names = (slots,) if isinstance(slots, str) else slots
                state |= {name: getattr(value, name) for name in names if name != "__dict__" and hasattr(value, name)}
        if isinstance(value, Mapping):
            self._each("items", *(part for pair in value.items() for part in pair))
        elif isinstance(value, AbstractSet):
            self._each("items", *sorted(map(Identity, value), key=str))
        elif isinstance(value, list | tuple | deque):
            self._each("items", *value)
        elif not state or isinstance(value, io.IOBase):
            try:
                self._hash.update(pickle.dumps(value, protocol=4))
            except Exception:  # whatever a type raises that cannot be written
                self.unknown = self.unknown or type(value).__qualname__
        for name, attribute in state.items():
            self._put(name)
            self._add(attribute)

    # ---- code ---------------------------------------------------------------------------------------------------------

    def _code(self, code: types.FunctionType | type) -> None:
        """Add a class or function: its name, and the version of its library or its source file.

        Of a library's class, methods that own code has replaced count, too.
        """
        self._put("code", code.__module__, code.__qualname__)
        library = _library_of(code)
        if library is not None:
            self._package(library)
            for member in vars(code).values() if isinstance(code, type) else ():
                if isinstance(member, types.FunctionType) and _library_of(member) is None:  # it replaces a method
                    self._add(member)
            return
        self.foreign = self.foreign or code.__qualname__
        try:
            self._put(_source(code))
        except OSError:
            self.unknown = self.unknown or f"the source of {code.__qualname__}"
        if isinstance(code, type):  # with the lines of its methods, of which one may have been replaced
            functions = [member for member in vars(code).values() if isinstance(member, types.FunctionType)]
            self._each("class", *code.__bases__, *(member.__code__.co_firstlineno for member in functions))
        else:
            cells = [cell.cell_contents for cell in code.__closure__ or () if cell != types.CellType()]
            self._each("function", code.__code__.co_firstlineno, code.__defaults__, code.__kwdefaults__, *cells)

    def _builtin(self, value: types.BuiltinFunctionType) -> None:
        self._package(value.__module__ or "")
        self._put(value.__qualname__)
        if not isinstance(value.__self__, types.ModuleType | type):
            self._add(value.__self__)

    def _package(self, name: str) -> None:
        self._put("package", name, version(name.partition(".")[0]))


# Looked through in order.
ADDERS: tuple[tuple[Any, Any], ...] = (
    (Tensor, Identity._tensor),
    (nn.Module, Identity._module),
    ((type, types.FunctionType), Identity._code),
    (types.BuiltinFunctionType, Identity._builtin),
    (Identity, Identity._identity),
    (types.MethodType, lambda self, value: self._each("method", value.__func__, value.__self__)),
    (functools.partial, lambda self, value: self._each("partial", value.func, value.args, value.keywords)),
    (types.ModuleType, lambda self, value: self._package(value.__name__)),
    (weakref.ref, lambda self, value: self._each("reference", value())),
    (os.PathLike, lambda self, value: self._put("path", os.fspath(value))),
    (NO_CONTENT, lambda self, value: self._put(type(value).__name__)),
    (object, Identity._object),
)


@functools.cache
def _adder(kind: type) -> Any:
    return next(add for kinds, add in ADDERS if issubclass(kind, kinds))


def weights_digest(module: nn.Module) -> str:
    """Return the identity of all parameters and buffers of a module by name, without its code."""
    named = (*module.named_parameters(), *module.named_buffers())
    return str(Identity(*(part for pair in named for part in pair)))


@functools.cache
def version(package: str) -> str:
    """Return what tells the code of a library from that of another version; "" for Python's own and one without a version.

    That of vismt, or of a part of it ("vismt.data"), is a digest of its source files.
    """
    if package.partition(".")[0] == PACKAGE.name:
        content = xxhash.xxh3_128()
        for path in sorted(PACKAGE.parent.joinpath(*package.split(".")).rglob("*.py")):
            content.update(f"{path.relative_to(PACKAGE).as_posix()} {path.stat().st_size} ".encode())
            content.update(path.read_bytes())
        return content.hexdigest()
    if package in sys.stdlib_module_names:
        return ""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a package with another name in the index, such as PIL
        return str(getattr(sys.modules.get(package), "__version__", ""))


def _library_of(code: types.FunctionType | type) -> str | None:
    """Return the package of a library that a function or class is of; None for own code."""
    scope = vars(sys.modules.get(code.__module__, types)) if isinstance(code, type) else code.__globals__
    file = scope.get("__file__")
    if isinstance(code, types.FunctionType) and not code.__code__.co_filename.startswith("<"):
        file = code.__code__.co_filename
    name = str(code.__module__).partition(".")[0]
    if not file:
        return name if name != "__main__" and name in sys.modules else None
    return name if file.startswith(_LIBRARIES) or "site-packages" in file else None


def _source(code: types.FunctionType | type) -> str:
    """Return a digest of the source file of own code, or without a file, as in a notebook, its text.

    Raises OSError if the source is missing.
    """
    if isinstance(code, types.FunctionType):
        file, parts = code.__code__.co_filename, [code]
    else:
        file = vars(sys.modules.get(code.__module__, types)).get("__file__") or ""
        functions = [part for part in vars(code).values() if isinstance(part, types.FunctionType)]
        # A dataclass writes functions that no file has.
        parts = [part for part in functions if not part.__code__.co_filename.startswith("<")]
    if os.path.isfile(file):
        return _file_digest(file, os.stat(file).st_mtime_ns)
    return "\n".join(map(inspect.getsource, parts))


@functools.cache
def _file_digest(file: str, changed: int) -> str:
    """Return a digest of a file that was changed at a time, in ns."""
    return xxhash.xxh3_128_hexdigest(Path(file).read_bytes())
