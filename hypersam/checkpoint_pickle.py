"""The pickles that ``torch.save`` writes, read as data: nothing in them is ever imported or called.

A pickle is a program for a stack machine. This machine knows the instructions that containers, numbers, strings and
tensors need, and gives a description of each tensor (``TensorPlan``) instead of making it. A name that a pickle asks
for is looked up in the tables below and nowhere else. Nothing recurses, so depth costs no stack; every instruction
makes one small object at most, and dictionaries made of lists are counted by their pairs, so ``MAX_PICKLE_BYTES`` and
``MAX_INSTRUCTIONS`` bound the memory.

Instructions: Python's ``pickletools``. What is said of tensors: ``hypersam.checkpoint_tensors``.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

from hypersam.checkpoint_tensors import (
    ARRAYS,
    CALLS,
    DTYPES,
    FROM_TYPE,
    ORDERED_DICT,
    STORAGES,
    UNUSUAL,
    Name,
    Other,
    StoragePlan,
    whole,
)
from hypersam.errors import CheckpointError, NotACheckpoint, UnsafeCheckpoint

MAX_PICKLE_BYTES = 8 << 20
MAX_INSTRUCTIONS = 1_000_000
"""The largest official checkpoint needs 120 kB and 30,000 instructions."""

# Harmless and of no interest: what is around a state dict. Their values are not made.
_IGNORED = frozenset({
    "builtins.set", "builtins.frozenset", "builtins.complex", "builtins.bytearray", "__builtin__.set",
    "__builtin__.frozenset", "__builtin__.complex", "__builtin__.bytearray", "_codecs.encode", "collections.Counter",
    "collections.defaultdict", "torch.Size", "torch.device", "torch.serialization._get_layout", "torch.Tensor",
    "torch.per_tensor_affine", "torch.per_tensor_symmetric", "torch.per_channel_affine",
    "torch.per_channel_symmetric", "torch.per_channel_affine_float_qparams",
    # What training scripts keep beside the weights: their arguments, figures, paths and times.
    "argparse.Namespace", "types.SimpleNamespace", "numpy.dtype", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar", "numpy.ndarray", "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath",
    "pathlib.PurePosixPath", "datetime.datetime", "datetime.timedelta",
})  # fmt: skip


_MARK = object()
_LEAF_KEYS = (str, int, float, bool, type(None))


def read_pickle(file: BinaryIO, name: str) -> Any:
    """The value of the pickle that ``file`` stands at; afterwards it stands behind it.

    Of dicts, lists, tuples, numbers, strings and bytes as they are, a ``TensorPlan`` a tensor and ``Other`` for the
    rest. ``file`` must be in memory, since a pickle says how much to read. ``name`` is for messages. Raises
    UnsafeCheckpoint for a pickle that asks for anything else, NotACheckpoint for bytes that are no pickle, and
    CheckpointError for keys that come twice.
    """
    machine = _Machine(name)
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if number >= MAX_INSTRUCTIONS:
                raise NotACheckpoint(f"{name} describes its tensors in more than {MAX_INSTRUCTIONS} instructions")
            if opcode.name == "STOP":
                return machine.result()
            machine.step(opcode.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, EOFError, OverflowError, AttributeError) as error:
        # The bytes make no sense as a pickle.
        raise NotACheckpoint(f"{name} is truncated or damaged: its pickle cannot be read ({_short(error)})") from error
    raise NotACheckpoint(f"{name} is truncated or damaged: its pickle does not end")


class _Machine:
    """The stack, the memo, and what each instruction does with them."""

    def __init__(self, name: str) -> None:
        self._file = name
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._paired = 0

    def result(self) -> Any:
        """What is left on the stack. Raises ValueError unless it is one value."""
        if len(self._stack) != 1 or self._stack[0] is _MARK:
            raise ValueError("it does not leave one value")
        return self._stack[0]

    def step(self, op: str, argument: Any) -> None:
        """Do one instruction."""
        if op in _PUSHES:
            self._stack.append(argument)
        elif op in _CONSTANTS:
            self._stack.append(_CONSTANTS[op])
        elif op in _MAKERS:
            self._stack.append(_MAKERS[op]())
        elif op in ("PROTO", "FRAME"):
            pass
        elif (action := _ACTIONS.get(op)) is not None:
            action(self, argument)
        else:
            self._refuse(f"the instruction {op}")

    def _refuse(self, asked: str) -> NoReturn:
        raise UnsafeCheckpoint(
            f"{self._file} is a pickle that asks for {ascii(asked)[1:-1][:200]}; only tensors in plain dictionaries "
            "are read. Nothing was executed. Save the state dict alone: torch.save(model.state_dict(), …)"
        )

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a value is missing")
        return value

    def _pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (value := self._stack.pop()) is not _MARK:
            items.append(value)
        items.reverse()
        return items

    def _mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def _drop(self, _: Any) -> None:
        self._stack.pop()

    def _drop_to_mark(self, _: Any) -> None:
        self._pop_to_mark()

    def _put(self, index: Any) -> None:
        if not 0 <= index < 1 << 32:  # for the same reason as keys
            raise ValueError("a value is remembered under an impossible number")
        self._memo[index] = self._top()

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._top()

    def _get(self, index: Any) -> None:
        self._stack.append(self._memo[index])

    def _top(self) -> Any:
        if self._stack[-1] is _MARK:
            raise ValueError("a value is missing")
        return self._stack[-1]

    def _tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def _tuple_of(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(items)))

    def _list(self, _: Any) -> None:
        self._stack.append(self._pop_to_mark())

    def _append(self, _: Any) -> None:
        value = self._pop()
        self._grow([value])

    def _appends(self, _: Any) -> None:
        self._grow(self._pop_to_mark())

    def _grow(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, list):
            target += items
        elif not isinstance(target, Other):
            raise ValueError("items are added to what is no list")

    def _dict(self, _: Any) -> None:
        items = self._pop_to_mark()
        self._stack.append({})
        self._set(items)

    def _setitem(self, _: Any) -> None:
        value = self._pop()
        self._set([self._pop(), value])

    def _setitems(self, _: Any) -> None:
        self._set(self._pop_to_mark())

    def _set(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, Other):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("items are put into what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._put_into(target, key, value)

    def _put_into(self, target: dict[Any, Any], key: Any, value: Any) -> None:
        # Of containers a hash would be asked, which recurses.
        if not isinstance(key, _LEAF_KEYS):
            raise CheckpointError(f"{self._file} has a dictionary with a {type(key).__name__} for a key")
        if isinstance(key, int) and key.bit_length() > 64:
            # Python's hash of whole numbers is no secret: of longer ones as many as one likes have the same.
            raise CheckpointError(f"{self._file} has a dictionary with a number of {key.bit_length()} bits for a key")
        if key in target:
            raise CheckpointError(f"{self._file} has the key {ascii(key)[:128]} twice in one dictionary")
        target[key] = value

    def _global(self, argument: Any) -> None:
        module, _, name = str(argument).partition(" ")
        self._name(module, name)

    def _stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a name is no string")
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        found = Name(module, name)
        if not (
            (module in ("torch", "torch.cuda", "torch.storage") and (name in STORAGES or name in DTYPES))
            or str(found) in _IGNORED
            or found == ORDERED_DICT
            or found in ARRAYS
            or str(found) in CALLS
            or (module == "torch._utils" and name in UNUSUAL)
        ):
            self._refuse(str(found))
        self._stack.append(found)

    def _persistent(self, _: Any) -> None:
        given = self._pop()
        # ('storage', storage type, key, device, number of values[, view])
        if not isinstance(given, tuple) or len(given) not in (5, 6) or given[0] != "storage":
            raise ValueError("a persistent id is no storage")
        kind, key, count = given[1], given[2], given[4]
        if not isinstance(kind, Name) or kind.name not in STORAGES:
            raise ValueError("a storage is of no known type")
        if len(given) == 6 and given[5] is not None:
            raise CheckpointError(
                f"{self._file} has storages that are views of others, as PyTorch 0.3 wrote; save it anew"
            )
        if not isinstance(key, str) or not whole(count):
            raise ValueError("a storage has no key or no size")
        self._stack.append(StoragePlan(key, STORAGES[kind.name], count))

    def _reduce(self, _: Any) -> None:
        arguments, called = self._pop(), self._pop()
        if not isinstance(called, Name) or not isinstance(arguments, tuple):
            self._refuse("a call of what is no name")
        self._stack.append(self._called(called, arguments))

    def _new_object(self, _: Any) -> None:
        """An instance of a class: a call, as far as this machine is concerned, and none of a class of tensors."""
        arguments, made = self._pop(), self._pop()
        if not isinstance(made, Name) or not isinstance(arguments, tuple):
            self._refuse("an object of what is no name")
        if str(made) not in _IGNORED:
            self._refuse(f"an object of {made}")
        self._stack.append(Other(f"a {made.name}"))

    def _called(self, called: Name, arguments: tuple[Any, ...]) -> Any:
        if called.module == "torch._utils" and called.name in UNUSUAL:
            return Other(UNUSUAL[called.name], tensor=True)
        if called in ARRAYS:
            return Other("a NumPy array", tensor=True)
        if called == ORDERED_DICT:
            return self._ordered_dict(arguments)
        if (rule := CALLS.get(str(called))) is not None:
            if called == FROM_TYPE:  # (function, type, arguments, attributes): a tensor that attributes were set on
                inner, _, inner_arguments, _ = arguments
                if not isinstance(inner, Name) or inner == FROM_TYPE or not isinstance(inner_arguments, tuple):
                    raise ValueError("a tensor cannot be rebuilt")
                return self._called(inner, inner_arguments)
            return rule(arguments)
        if str(called) in _IGNORED:
            return Other(f"a {called.name}")
        self._refuse(f"a call of {called}")

    def _ordered_dict(self, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        """An empty one, or one of pairs, as Python 2 wrote it."""
        pairs = arguments[0] if arguments else []
        if len(arguments) > 1 or not isinstance(pairs, list):
            raise ValueError("an OrderedDict is filled in an unknown way")
        self._paired += len(pairs)  # the one instruction that makes something large, and one list may serve many
        if self._paired > MAX_INSTRUCTIONS:
            raise NotACheckpoint(f"{self._file} fills its dictionaries with more than {MAX_INSTRUCTIONS} pairs")
        found: dict[Any, Any] = {}
        for key, value in pairs:
            self._put_into(found, key, value)
        return found

    def _build(self, _: Any) -> None:
        """Attributes, such as the ``_metadata`` of a state dict, are read and forgotten."""
        self._pop()
        if isinstance(self._top(), Name):
            self._refuse("attributes of a name")

    def _set_items_of_other(self, _: Any) -> None:
        self._pop_to_mark()
        if not isinstance(self._top(), Other):
            raise ValueError("items are added to what is no set")

    def _frozenset(self, _: Any) -> None:
        self._pop_to_mark()
        self._stack.append(Other("a frozenset"))


def _short(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


_PUSHES = frozenset({
    "INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
})  # fmt: skip
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_MAKERS: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": lambda: Other("a set")}
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine._mark, "POP": _Machine._drop, "POP_MARK": _Machine._drop_to_mark,
    "PUT": _Machine._put, "BINPUT": _Machine._put, "LONG_BINPUT": _Machine._put, "MEMOIZE": _Machine._memoize,
    "GET": _Machine._get, "BINGET": _Machine._get, "LONG_BINGET": _Machine._get,
    "TUPLE": _Machine._tuple, "TUPLE1": lambda m, _: m._tuple_of(1), "TUPLE2": lambda m, _: m._tuple_of(2),
    "TUPLE3": lambda m, _: m._tuple_of(3), "LIST": _Machine._list, "APPEND": _Machine._append,
    "APPENDS": _Machine._appends, "DICT": _Machine._dict, "SETITEM": _Machine._setitem,
    "SETITEMS": _Machine._setitems, "GLOBAL": _Machine._global, "STACK_GLOBAL": _Machine._stack_global,
    "BINPERSID": _Machine._persistent, "REDUCE": _Machine._reduce, "NEWOBJ": _Machine._new_object,
    "BUILD": _Machine._build, "ADDITEMS": _Machine._set_items_of_other, "FROZENSET": _Machine._frozenset,
}  # fmt: skip
