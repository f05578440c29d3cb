"""The identity of models, data and code, as a 128-bit digest (XXH3) of everything that they consist of.

A model consists of the values of all its tensors, the settings of its modules (every attribute that is not a tensor), its
hooks, and the code of its classes. A library's class or function is identified by the version of the library, and by own
functions that replace its methods. An own class or function is identified by its source file, with the defaults and the closure
of a function. Our own package is versioned by its source files.

A thing without readable content (an open file, a generator, code without a source) has no identity. `unknown` names it, and a
caller computes again. Some changes are not seen: modules that own code imports, functions of a module that are replaced while
the program runs, state inside C code, and files that code reads while it runs.
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
from collections.abc import Callable, Collection, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_CONTAINERS = (dict, list, tuple, set, frozenset)
NO_CONTENT = (logging.Logger, type(threading.Lock()), type(threading.RLock()))  # objects on which no number depends
OF_MODULE = frozenset(vars(nn.Module()))
# `training` is the caller's choice. Adapted models write merged files, by a function of the model.
NO_NUMBER = OF_MODULE | {"save_pretrained"}
_HOOKS = tuple(name for name in sorted(OF_MODULE) if name.endswith("_hooks"))
PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARIES = tuple(
    {str(PACKAGE), *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))}
)


class Identity:
    """The identity of values together. `str` gives its 32 hexadecimal digits.

    Args:
        values: Models, functions, tensors, images, arrays, plain values, other identities, and containers and objects of these.
        skip: Modules that do not compute.

    Attributes:
        unknown: Description of what has no readable content, None if everything is known. With it the digest identifies
            nothing.
        foreign: Code that belongs to no library, or a function that replaces a module's method. None if there is none.
    """

    def __init__(self, *values: object, skip: Collection[nn.Module] = ()) -> None:
        self.unknown: str | None = None
        self.foreign: str | None = None
        self._hash = xxhash.xxh3_128()
        self._seen: dict[int, tuple[int, object]] = {}  # the values are kept, so that their ids stay unique
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

    def _each(self, what: str, *values: object) -> None:
        self._put(what, len(values))
        for value in values:
            self._add(value)

    def _add(self, value: Any) -> None:
        """Add a value. A value that was added before is added as its number."""
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
        # The numbers by which torch finds them are left out.
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

    def _object(self, value: object) -> None:
        """Add a container, an array or another object by its type, its items and its attributes."""
        self._put("object", type(value).__qualname__)
        if hasattr(value, "tobytes") and (hasattr(value, "dtype") or hasattr(value, "getexif")):
            self._array(value)
            return
        state: dict[str, object] = {}
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
            except Exception:  # a type that cannot be written may raise any error
                self.unknown = self.unknown or type(value).__qualname__
        for name, attribute in state.items():
            self._put(name)
            self._add(attribute)

    # ---- code ---------------------------------------------------------------------------------------------------------

    def _code(self, code: types.FunctionType | type) -> None:
        """Add a class or function by its name, and by the version of its library or its source file.

        For a library's class, methods that own code has replaced count too.
        """
        self._put("code", code.__module__, code.__qualname__)
        library = _library_of(code)
        if library is not None:
            self._package(library)
            for member in vars(code).values() if isinstance(code, type) else ():
                # the function replaces a method
                if isinstance(member, types.FunctionType) and _library_of(member) is None:
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


# The order of the search.
ADDERS: tuple[tuple[type | tuple[type, ...], Callable[[Identity, Any], None]], ...] = (
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
def _adder(kind: type) -> Callable[[Identity, object], None]:
    return next(add for kinds, add in ADDERS if issubclass(kind, kinds))


def weights_digest(module: nn.Module) -> str:
    """Return the identity of all parameters and buffers of a module by name, without its code."""
    named = (*module.named_parameters(), *module.named_buffers())
    return str(Identity(*(part for pair in named for part in pair)))


@functools.cache
def version(package: str) -> str:
    """Return a text that tells the version of a library's code.

    It is "" for Python's own code and for a library without a version. For vismt, or a part of it ("vismt.data"), it is a
    digest of the source files.
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
    """Return the package of the library that a function or class belongs to. Return None for own code."""
    scope = vars(sys.modules.get(code.__module__, types)) if isinstance(code, type) else code.__globals__
    file = scope.get("__file__")
    if isinstance(code, types.FunctionType) and not code.__code__.co_filename.startswith("<"):
        file = code.__code__.co_filename
    name = str(code.__module__).partition(".")[0]
    if not file:
        return name if name != "__main__" and name in sys.modules else None
    return name if file.startswith(_LIBRARIES) or "site-packages" in file else None


def _source(code: types.FunctionType | type) -> str:
    """Return a digest of the source file of own code, or, without a file (as in a notebook), of its text.

    Raise OSError if the source is missing.
    """
    if isinstance(code, types.FunctionType):
        file, parts = code.__code__.co_filename, [code]
    else:
        file = vars(sys.modules.get(code.__module__, types)).get("__file__") or ""
        functions = [part for part in vars(code).values() if isinstance(part, types.FunctionType)]
        # A dataclass writes functions that are in no file.
        parts = [part for part in functions if not part.__code__.co_filename.startswith("<")]
    if os.path.isfile(file):
        return _file_digest(file, os.stat(file).st_mtime_ns)
    return "\n".join(map(inspect.getsource, parts))


@functools.cache
def _file_digest(file: str, changed: int) -> str:
    """Return a digest of a file that was changed at a time in nanoseconds."""
    return xxhash.xxh3_128_hexdigest(Path(file).read_bytes())
