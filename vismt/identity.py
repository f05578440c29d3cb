"""What a number belongs to: the identity of models, data and code, as a 128-bit digest (XXH3) of all that they consist of.

A model is the values of all its tensors, the settings of its modules (every attribute that is not a tensor), its hooks, and the
code of its classes as it runs: methods that were replaced on a class or an instance count, and so do global hooks. A data set is
all its examples. The code of an own function is its bytecode, defaults and closure, with the functions and values that it
names, wherever they lead. The code of a library is its version, the bytecode of the methods of the classes in use, and that of
the functions which these name. Our own package is versioned by its source files.

What has no readable content (an open file, a generator) has no identity: `unknown` names it, and a caller computes again.
Not seen: code that a library calls through two of its own functions, replaced inside the library; what C code keeps; files that
code reads as it runs.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import io
import logging
import os
import pickle
import sys
import sysconfig
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

PLAIN = (type(None), bool, int, float, complex, str, bytes)
CONTAINERS = (dict, list, tuple, set, frozenset, deque, OrderedDict)
INERT = (logging.Logger, type(threading.Lock()), type(threading.RLock()))  # no number depends on them
OF_MODULE = frozenset(vars(nn.Module()))
HOOKS = tuple(name for name in sorted(OF_MODULE) if name.endswith("_hooks"))
# Attributes of a class that Python keeps about it.
ABOUT_CLASS = frozenset(
    "__dict__ __weakref__ __doc__ __module__ __annotations__ __annotate__ __annotate_func__ __annotations_cache__ "
    "__abstractmethods__ _abc_impl __parameters__ __orig_bases__ __dataclass_fields__ __dataclass_params__ "
    "__firstlineno__ __static_attributes__".split()
)
PACKAGE = str(Path(__file__).parent)
LIBRARIES = (PACKAGE, *{str(Path(sysconfig.get_path(name))) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


class Identity:
    """The identity of values together.

    Args:
        values: models, functions, tensors, images, arrays, plain values, and containers and objects of them.
        instead: tensors that a model runs on in the place of its own, by the names of its parameters and buffers.
        skip: modules that do not compute.

    Attributes:
        unknown: what has no readable content, None where all is known. The digest then is no identity.
        foreign: code that is not of a library, or that replaces a library's, None where there is none.
    """

    def __init__(
        self, *values: Any, instead: Mapping[str, Tensor] | None = None, skip: Collection[nn.Module] = ()
    ) -> None:
        self.unknown: str | None = None
        self.foreign: str | None = None
        self._hash = xxhash.xxh3_128()
        self._seen: dict[int, tuple[int, Any]] = {}  # the values are kept: their ids stay theirs
        self._skip = {id(module) for module in skip}
        self._instead: dict[int, Tensor] = {}
        self._libraries: set[str] = set()
        self._read: set[tuple[int, tuple[str, ...]]] = set()  # modules of Python, with the names read from them
        for module in values if instead else ():
            named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
            self._instead |= {id(own): instead[name] for name, own in named if name in instead}
        try:
            for value in values:
                self._add(value)
        except RecursionError:
            self.unknown = "objects nested too deeply"
        for library in sorted(self._libraries):
            self._put(library, version(library))

    def __str__(self) -> str:
        """Return the digest, 32 hexadecimal digits."""
        return self._hash.hexdigest()

    def _put(self, *texts: object) -> None:
        line = "\0".join(map(str, texts)).encode(errors="surrogatepass")
        self._hash.update(b"%d:%b" % (len(line), line))

    def _add(self, value: Any) -> None:
        """Add a value; one that was added before, as its number."""
        if type(value) in PLAIN:
            self._put(type(value).__name__, repr(value))
            return
        if id(value) in self._skip:
            return
        value = self._instead.get(id(value), value)
        if id(value) in self._seen:
            self._put("again", self._seen[id(value)][0])
            return
        self._seen[id(value)] = len(self._seen), value
        if isinstance(value, type):
            self._class(value)
        elif isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._each("method", (value.__func__, value.__self__))
        elif isinstance(value, types.BuiltinFunctionType):
            self._put(value.__module__, value.__qualname__)
            self._libraries.add((value.__module__ or "").partition(".")[0])
            self._each("of", () if isinstance(value.__self__, types.ModuleType | type) else (value.__self__,))
        elif isinstance(value, functools.partial):
            self._each("partial", (value.func, value.args, value.keywords))
        elif _unwrapped(value) is not None:
            self._each(type(value).__name__, _unwrapped(value))
        elif isinstance(value, types.ModuleType):
            self._put("package", value.__name__)
            self._libraries.add(value.__name__.partition(".")[0])
        elif isinstance(value, weakref.ref):
            self._add(value())
        elif isinstance(value, os.PathLike):
            self._put("path", os.fspath(value))
        elif isinstance(value, INERT):
            self._put(type(value).__name__)
        else:
            self._object(value)

    def _each(self, what: str, values: Iterable[Any]) -> None:
        values = list(values)
        self._put(what, len(values))
        for value in values:
            self._add(value)

    # ---- values -------------------------------------------------------------------------------------------------------

    def _tensor(self, value: Tensor) -> None:
        self._put("tensor", value.dtype, tuple(value.shape))
        if hasattr(value, "__tensor_flatten__"):
            names, about = value.__tensor_flatten__()
            self._each(type(value).__name__, (*(getattr(value, name) for name in names), about))
        elif value.layout != torch.strided or value.is_quantized:
            self._miss(f"a tensor of layout {value.layout}")
        elif not value.is_meta:
            plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
            self._hash.update(plain.flatten().view(torch.uint8).numpy().data)
            if type(value) not in (Tensor, nn.Parameter, nn.Buffer):  # such as packed weights with their scales
                self._add(dict(vars(value)))

    def _object(self, value: Any) -> None:
        """Add a container or an object: its type, its items and its attributes."""
        self._put("object", type(value).__qualname__)
        if type(value) not in CONTAINERS:
            self._add(type(value))
        state = dict(getattr(value, "__dict__", {}))
        for base in type(value).__mro__:
            slots = base.__dict__.get("__slots__", ())
            names = (slots,) if isinstance(slots, str) else slots
            state |= {name: getattr(value, name) for name in names if name != "__dict__" and hasattr(value, name)}
        if isinstance(value, Mapping):
            self._each("items", (part for pair in value.items() for part in pair))
        elif isinstance(value, list | tuple | deque):
            self._each("items", value)
        elif isinstance(value, AbstractSet):
            self._put("set", sorted(str(self._part(item)) for item in value))
        elif type(value).__module__.startswith("PIL.") and hasattr(value, "tobytes"):
            facts = (
                value.mode,
                value.size,
                value.getpalette(),
                value.info.get("transparency"),
                value.getexif().get(0x0112),
            )
            self._put("image", repr(facts))
            self._hash.update(value.tobytes())
            return
        elif hasattr(value, "dtype") and hasattr(value, "tobytes"):  # an array or a number of NumPy
            self._put("array", value.dtype, value.shape)
            if value.dtype.hasobject:
                self._each("items", value.ravel().tolist())
            else:
                self._hash.update(value.tobytes())
        elif not state or isinstance(value, io.IOBase):
            try:
                self._hash.update(pickle.dumps(value, protocol=4))
            except Exception:  # whatever a type raises that cannot be written
                self._miss(type(value).__qualname__)
        for name, attribute in state.items():
            self._put(name)
            self._add(attribute)

    def _part(self, value: Any) -> Identity:
        """Return the identity of an item of a set, which has no order."""
        part = Identity(value)
        self.unknown, self.foreign = self.unknown or part.unknown, self.foreign or part.foreign
        return part

    def _miss(self, what: str) -> None:
        self.unknown = self.unknown or what

    def _module(self, module: nn.Module) -> None:
        self._put("module")
        self._add(type(module))
        for name, value in vars(module).items():
            if name in OF_MODULE:  # `training` is the caller's choice
                continue
            if callable(value) and callable(getattr(type(module), name, None)):
                self.foreign = self.foreign or f"{type(module).__name__}.{name}"
            self._put(name)
            self._add(value)
        for name in HOOKS:
            if vars(module)[name]:
                self._each(name, vars(module)[name].values())
        for kind in ("_parameters", "_buffers", "_modules"):
            for name, value in vars(module)[kind].items():
                self._put(kind, name)
                self._add(value)

    # ---- code ---------------------------------------------------------------------------------------------------------

    def _class(self, given: type) -> None:
        own = self._is_own(given.__module__, getattr(sys.modules.get(given.__module__), "__file__", None), given)
        self._put("class", given.__module__, given.__qualname__)
        for base in given.__bases__ if given is not object else ():
            self._add(base)
        for name, member in vars(given).items():
            if name not in ABOUT_CLASS:
                self._put(name)
                self._referred(member, (), own, methods=True)

    def _function(self, function: types.FunctionType) -> None:
        code, scope = function.__code__, function.__globals__
        file = scope.get("__file__") if code.co_filename.startswith("<") else code.co_filename
        own = self._is_own(str(scope.get("__name__")), file, function)
        self._put("function", _code(code))
        names = _names(code)
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._referred(value, names, own)
        for value in cells:
            self._referred(value, names, own, methods=True)
        for name in names:
            if name in scope:
                self._put(name)
                self._referred(scope[name], names, own)

    def _is_own(self, module: str, file: str | None, what: Any) -> bool:
        """Return whether code is not of a library; note it, or the library."""
        package = module.partition(".")[0]
        if _is_library(file) if file else package in sys.builtin_module_names or package not in sys.modules:
            self._libraries.add(package)
            return False
        if not file and package != "__main__":  # an extension, or a package without files
            self._libraries.add(package)
            return False
        self.foreign = self.foreign or what.__qualname__
        return True

    def _referred(self, value: Any, names: tuple[str, ...], own: bool, methods: bool = False) -> None:
        """Add what code refers to: all of it from own code, code and plain values alone from a library's.

        methods: whether functions of a library are followed; otherwise their own code counts.
        """
        if isinstance(value, types.ModuleType):
            new = (id(value), names) not in self._read
            self._read.add((id(value), names))
            for name in names if new else ():
                if name in vars(value):
                    self._put(name)
                    self._referred(vars(value)[name], names, own)
            return
        if own and isinstance(value, types.FunctionType | type) and _is_library(_file_of(value)):
            own = False
        if isinstance(value, types.FunctionType) and not methods and not own and _is_library(_file_of(value)):
            self._put(_code(value.__code__))
        elif own or isinstance(value, (*PLAIN, types.FunctionType)):
            self._add(value)
        elif _unwrapped(value) is not None:
            for part in _unwrapped(value) or ():
                self._referred(part, names, own, methods)
        elif isinstance(value, Mapping):  # such as global hooks and registries of functions
            for key in list(value):
                self._put(key)
                if isinstance(value[key], types.FunctionType):
                    self._referred(value[key], names, own)
        else:
            self._put(type(value).__qualname__)


def version(package: str) -> str:
    """Return what tells the code of a library from that of another version; "" for Python's own and one without a version.

    That of vismt, or of a part of it ("vismt.data"), is a digest of its source files.
    """
    if package.partition(".")[0] == __name__.partition(".")[0]:
        return _sources(package)
    if package in sys.stdlib_module_names:
        return ""
    try:
        return str(getattr(sys.modules.get(package), "__version__", None) or importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def _sources(package: str) -> str:
    content = xxhash.xxh3_128()
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).rglob("*.py")):
            content.update(path.relative_to(folder).as_posix().encode())
            content.update(path.read_bytes())
    return content.hexdigest()


@functools.cache
def _is_library(file: str | None) -> bool:
    return file is not None and (file.startswith((*LIBRARIES, "<frozen")) or "site-packages" in file)


def _file_of(code: Any) -> str | None:
    """Return the file of a function or class."""
    if isinstance(code, types.FunctionType) and not code.__code__.co_filename.startswith("<"):
        return code.__code__.co_filename
    return getattr(sys.modules.get(code.__module__), "__file__", None)


def _unwrapped(value: Any) -> tuple[Any, ...] | None:
    """Return the functions inside a method of a class that is not a plain function; None for any other value."""
    if isinstance(value, staticmethod | classmethod):
        return (value.__func__,)
    if isinstance(value, property):
        return value.fget, value.fset
    if isinstance(value, functools.cached_property):
        return (value.func,)
    wrapped = getattr(value, "__wrapped__", None) if hasattr(value, "cache_info") else None
    return None if wrapped is None else (wrapped,)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


@functools.cache
def _code(code: types.CodeType) -> str:
    """Return a digest of what a function's code does, wherever it stands in its file."""
    parts = [
        code.co_argcount,
        code.co_posonlyargcount,
        code.co_kwonlyargcount,
        code.co_flags,
        code.co_code,
        getattr(code, "co_exceptiontable", b""),
        code.co_names,
        code.co_varnames,
        code.co_freevars,
        code.co_cellvars,
        [_constant(value) for value in code.co_consts],
    ]
    return xxhash.xxh3_128_hexdigest(repr(parts).encode(errors="surrogatepass"))


def _constant(value: Any) -> str:
    if isinstance(value, types.CodeType):
        return _code(value)
    if isinstance(value, tuple):
        return repr([_constant(item) for item in value])
    if isinstance(value, frozenset):
        return repr(sorted(map(_constant, value)))
    return f"{type(value).__name__} {value!r}"


@functools.cache
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Return the names that a function's code uses, and the functions inside it."""
    inner = [_names(value) for value in code.co_consts if isinstance(value, types.CodeType)]
    return tuple(dict.fromkeys(name for names in (code.co_names, *inner) for name in names))
