"""Files that were made to do harm: pickles that run programs, lies about sizes, bombs."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

_DEEP = 100_000


class _Runs:
    """Unpickled, it calls a function."""

    def __init__(self, function: Any, *arguments: str) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def pickles(canary: Path) -> dict[str, bytes]:
    """Pickles that would make a file, by what they are called from and by protocol."""
    calls = {
        "system": _Runs(os.system, f"touch {canary}"),
        "open": _Runs(open, str(canary), "w"),
        "eval": _Runs(eval, f"open({str(canary)!r}, 'w')"),
    }
    return {
        f"pickle of {name}, protocol {protocol}": pickle.dumps(call, protocol)
        for name, call in calls.items()
        for protocol in (0, 2, 5)
    }


def torch_pickles(canary: Path) -> dict[str, bytes]:
    """The same inside of what torch writes, and of an archive of TorchScript."""
    content = {"model": {"w": torch.ones(2), "x": _Runs(os.system, f"touch {canary}")}}
    found = {}
    for name, is_archive in (("zip", True), ("before 1.6", False)):
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=is_archive)
        found[f"torch pickle, {name}"] = file.getvalue()
    evil = pickle.dumps(content["model"]["x"], 2)
    members = {"constants.pkl": evil, "data.pkl": evil, "code/x.py": b"open('x', 'w')"}
    return found | {"TorchScript": _zip(members)}


TEXTS: dict[str, bytes] = {
    "nothing": b"",
    "zeros": bytes(1_000),
    "null": b"null",
    "a number": b"1",
    "a list": b"[]",
    "an object": b"{}",
    "no JSON": b"{",
    "lists without end": b"[" * _DEEP,
    "lists in lists": b"[" * _DEEP + b"]" * _DEEP,
    "objects in objects": b'{"a":' * _DEEP + b"1" + b"}" * _DEEP,
    "900 lists": b"[" * 900 + b"]" * 900,
    "300 objects": b'{"a":' * 300 + b"1" + b"}" * 300,
    "NaN": b"NaN",
    "Infinity": b'{"a": Infinity}',
    "5,000 digits": b"1" * 5_000,
    "4,000 digits": b"1" * 4_000,
    "a huge float": b"1e999",
    "not UTF-8": b"\xff\xfe{}",
    "half a character": b'"\\ud800"',
    "a name twice": b'{"type": "a", "type": "b"}',
}
"""What no text or JSON file should be."""


def safetensors(header: Any, content: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with this header, and with this length of one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


def lying_safetensors() -> dict[str, bytes]:
    """Files of tensors whose headers say what is not so."""
    good = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    numbers = bytes(16)
    headers = {
        "beyond the file": {"a": good | {"shape": [4, 4], "data_offsets": [0, 64]}},
        "overlapping": {"a": good, "b": good},
        "a hole": {"a": good, "b": good | {"data_offsets": [32, 48]}},
        "a negative place": {"a": good | {"data_offsets": [-16, 0]}},
        "a negative shape": {"a": good | {"shape": [-2, -2]}},
        "a shape that overflows": {"a": good | {"shape": [2**40, 2**40]}},
        "a shape of 2**64": {"a": good | {"shape": [2**32, 2**32], "data_offsets": [0, 0]}},
        "an unknown type": {"a": good | {"dtype": "X"}},
        "a list": [],
    }
    twice = b'{"a":%s,"a":%s}' % ((json.dumps(good).encode(),) * 2)
    return {
        **{name: safetensors(header, numbers) for name, header in headers.items()},
        "a header of 2**63 bytes": safetensors({"a": good}, numbers, length=2**63),
        "a header of 2**64 - 1 bytes": safetensors({"a": good}, numbers, length=2**64 - 1),
        "a header of 90 MiB": safetensors({"a": good}, numbers, length=90 << 20),
        "a deep header": safetensors(b'{"a":' * _DEEP + b"1" + b"}" * _DEEP),
        "a name twice": safetensors(twice, bytes(32)),
    }


def _zip(members: dict[str, bytes], *, packed: bool = False) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as made:
        for name, content in members.items():
            made.writestr(f"m/{name}", content)
    return file.getvalue()


class _Tensor:
    def __init__(self, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self._parts = (size, stride)

    def __reduce__(self) -> Any:
        size, stride = self._parts
        return torch._utils._rebuild_tensor_v2, (_Numbers(), 0, size, stride, False, OrderedDict())


class _Numbers:
    """Stands for the numbers of a tensor."""


class _Pickler(pickle.Pickler):
    count = 4

    def persistent_id(self, thing: Any) -> Any:
        is_numbers = isinstance(thing, _Numbers)
        return ("storage", torch.FloatStorage, "0", "cpu", self.count) if is_numbers else None


def torch_file(
    *, count: int, size: tuple[int, ...], stride: tuple[int, ...], numbers: bytes, **more: Any
) -> bytes:
    """A file of torch's that says of one tensor whatever is wanted; ``packed``: deflated."""
    described = io.BytesIO()
    pickler = _Pickler(described, 2)
    pickler.count = count
    pickler.dump({"w": _Tensor(size, stride)})
    members = {"data.pkl": described.getvalue(), "version": b"3\n", "data/0": numbers}
    constants = {"constants.pkl": b""} if more.pop("script", False) else {}
    return _zip(members | constants, **more)


def torch_bombs(zeros: bytes) -> dict[str, bytes]:
    """Small files of torch's that would fill the memory, or be walked through for days."""
    inner: dict[str, Any] = {}
    for _ in range(4):
        inner = {f"k{number}": inner for number in range(1_500)}
    laughs = _zip({"data.pkl": pickle.dumps(inner, 2), "version": b"3\n"})
    few = bytes(16)
    one = {"count": 4, "size": (10**9,), "stride": (0,), "numbers": few}
    many = {"count": 10**9, "size": (10**9,), "stride": (1,), "numbers": few}
    count = len(zeros) // 4
    whole = {"count": count, "size": (count,), "stride": (1,), "numbers": zeros, "packed": True}
    return {
        "one number a billion times": torch_file(**one),
        "TorchScript, one number a billion times": torch_file(**one, script=True),
        "more numbers than bytes": torch_file(**many),
        "TorchScript, more numbers than bytes": torch_file(**many, script=True),
        "deflated zeros": torch_file(**whole),
        "TorchScript, deflated zeros": torch_file(**whole, script=True),
        "a mapping in itself a thousand times": laughs,
    }


def tar_header(name: str, size: int, kind: bytes = b"0") -> bytes:
    """A header with any size, and a checksum that is right."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (b"\x80" if size >= 0 else b"\xff") + size.to_bytes(11, "big", signed=True)
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


_END = bytes(1_024)
_MEMBER = b"abc" + bytes(509)


def hostile_tars() -> dict[str, bytes]:
    """Tars that lead backward, out of their folder, or to more than there is."""
    plain = tar_header("b.jpg", 3) + _MEMBER
    kinds = {
        "plain": b"0", "long name": b"L", "long link": b"K", "extended": b"x", "global": b"g",
        "sparse": b"S", "folder": b"5", "hard link": b"1", "symbolic link": b"2", "device": b"3",
    }  # fmt: skip
    sizes = (2**80, 2**62, 2**33, -512, -1_024, -1_536, -(2**62))
    found = {
        f"{name} of {size} bytes": plain + tar_header("a.jpg", size, kind) + _MEMBER + _END
        for name, kind in kinds.items()
        for size in sizes
    }
    for name in ("../../evil.jpg", "/tmp/evil.jpg", "../" * 20 + "etc/evil.jpg"):
        found[f"a member {name}"] = tar_header(name, 3) + _MEMBER + _END
    for kind in (b"1", b"2"):
        member = tarfile.TarInfo("a.jpg")
        member.type, member.linkname = kind, "/etc/passwd"
        found[f"a link {kind!r} to /etc/passwd"] = member.tobuf() + _END
    record = b"size=-1024"
    record = b"%d %s\n" % (len(record) + 4, record)
    extended = tar_header("x", len(record), b"x") + record.ljust(512, b"\0")
    found["an extended size of -1,024"] = plain + extended + tar_header("c.jpg", 3) + _MEMBER + _END
    found["compressed zeros"] = gzip.compress(bytes(100 << 20), 1)
    return found


def png(width: int, height: int, *, chunk: tuple[bytes, bytes] | None = None) -> bytes:
    """A PNG of this size with almost no pixels, and with another chunk."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), *([chunk] if chunk else []), (b"IDAT", zlib.compress(bytes(99)))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + named + struct.pack(">I", zlib.crc32(named))
        for kind, content in (*chunks, (b"IEND", b""))
        for named in [kind + content]
    )


def gif(screen: int, frame: int, frames: int = 1) -> bytes:
    """A GIF of this many square frames on a square screen."""
    made = b"GIF89a" + struct.pack("<HHBBB", screen, screen, 0x80, 0, 0) + bytes(6)
    return made + (b"," + struct.pack("<HHHHB", 0, 0, frame, frame, 0) + b"\2\2\x4c\1\0") * frames


def hostile_images() -> dict[str, bytes]:
    """Pictures that are small as files and not as pixels."""
    swollen = b"a\0\0" + zlib.compress(bytes(100 << 20))
    return {
        "3,600 megapixels in 100 bytes": png(60_000, 60_000),
        "144 megapixels in 100 bytes": png(12_000, 12_000),
        "a text of 100 MiB": png(9, 9, chunk=(b"zTXt", swollen)),
        "a color profile of 100 MiB": png(9, 9, chunk=(b"iCCP", swollen)),
        "a huge screen": gif(65_535, 9),
        "a huge frame": gif(9, 65_535),
        "144 megapixels in a frame": gif(12_000, 12_000),
        "10,000 frames": gif(100, 100, 10_000),
        "a bitmap": b"BM"
        + struct.pack("<IHHIIiiHH", 9, 0, 0, 54, 40, 9**5, 9**5, 1, 24)
        + bytes(24),
        "a pixmap": b"P6 60000 60000 255\n",
        "a pixmap of 10**99 pixels": b"P6 " + b"9" * 99 + b" 1 255\n",
    }
