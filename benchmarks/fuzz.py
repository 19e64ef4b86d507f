"""Thousands of files with something wrong in them, to every reader of files that others wrote.

    python benchmarks/fuzz.py                  # 2,000 tars, 500 each of all else; half an hour
    python benchmarks/fuzz.py --share 0.01     # what the tests do

Whole files (a shard and its index, pictures, lists of captions, recipes, checkpoints and folders of
weights) are changed at random, from a fixed seed: bytes, bits, cuts, repetitions, numbers in binary
headers, and values of JSON and of safetensors' headers. Each is read as a run reads it, in a
process whose memory, time and writing are watched (``confined.py``).

What must hold of every one: it is read, refused with one sentence, or counted as damaged. Nothing
else is raised, nothing hangs, nothing is written or started, no memory beyond the bound.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import random
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from confined import FINE, Bounds, Outcome, confined_each
from measuring import write
from PIL import Image
from safetensors.torch import save_file

from frugal.common.checkpoint.store import find_checkpoint, load_weights
from frugal.common.data.damage import Damaged
from frugal.common.data.decoding import Window, open_image, resize_window
from frugal.common.data.samples import Fields, Reader
from frugal.common.data.stores.csv import open_list
from frugal.common.data.stores.index import read_summary, write_index
from frugal.common.data.stores.streamed_tar import stream_tar
from frugal.common.data.stores.tar import TarReader, index_tar
from frugal.common.data.writing import NewSample, write_tars
from frugal.common.recipe_json import load_recipe, to_json
from frugal.common.weights.files import read_weights

MEMORY = 512 << 20
"""Bytes by which one file of a few KB may make a process grow."""
COUNTS = {
    "tars": 2_000, "streamed tars": 500, "images": 500, "recipes": 500, "indexes": 500,
    "checkpoints": 500, "caption lists": 500, "weights": 500,
}  # fmt: skip
_STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 1.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "a", "../../x", "/etc/passwd", "\0", "\ud800", "a" * 5_000, [], {}, [[]],
    {"type": "os.system"}, {"type": "frugal.common.recipe.Recipe"}, [1] * 1_000,
)  # fmt: skip
_NUMBERS = (0, 1, -1, 2**15, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63))


# ------------------------------------------------------------------------------------------------
# What is changed


def changed_bytes(content: bytes, chance: random.Random) -> bytes:
    """The same with a few things wrong."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        _change(changed, chance)
    return bytes(changed)


def _change(content: bytearray, chance: random.Random) -> None:
    size = len(content)
    # headers are what readers believe, and are most often in front
    place = chance.randrange(max(1, min(size, chance.choice((64, 1_024, size or 1)))))
    length = chance.choice((1, 2, 8, 64, 512, 2_048))
    way = chance.randrange(8)
    if way == 0:
        content[place : place + 1] = bytes([chance.randrange(256)])
    elif way == 1 and place < size:
        content[place] ^= 1 << chance.randrange(8)
    elif way == 2:
        del content[place:]
    elif way == 3:
        del content[place : place + length]
    elif way == 4:
        content[place:place] = content[place : place + length]
    elif way == 5:
        content[place : place + length] = bytes(length)
    elif way == 6:
        content[place : place + 8] = struct.pack(
            chance.choice(("<q", ">q")), chance.choice(_NUMBERS)
        )
    else:
        content[place:place] = chance.randbytes(length)


def changed_tar(content: bytes, chance: random.Random) -> bytes:
    """The same, of a tar: fields of headers with a checksum that is right, or any bytes."""
    if chance.random() < 0.4:
        return changed_bytes(content, chance)
    changed = bytearray(content)
    headers = [n for n in range(0, len(changed), 512) if changed[n + 257 : n + 262] == b"ustar"]
    for start in chance.sample(headers, chance.choice((1, 1, 3))):
        field, length = chance.choice(_TAR_FIELDS)
        if field == _TAR_SIZE:
            value = chance.choice((*_NUMBERS, 511, 512, 513, -512, -1_024, -1_536, -4_096))
            content_of = b"\x80" if value >= 0 else b"\xff"
            written = content_of + value.to_bytes(11, "big", signed=True)
        else:
            written = chance.choice(_TAR_TEXTS)[:length].ljust(length, b"\0")
        changed[start + field : start + field + length] = written
        changed[start + 148 : start + 156] = b" " * 8
        checksum = sum(changed[start : start + 512])
        changed[start + 148 : start + 156] = b"%06o\0 " % checksum
    return bytes(changed) if chance.random() < 0.8 else changed_bytes(bytes(changed), chance)


_TAR_SIZE = 124
_TAR_FIELDS = (
    (0, 100),
    (_TAR_SIZE, 12),
    (_TAR_SIZE, 12),
    (156, 1),
    (156, 1),
    (157, 100),
    (345, 155),
)
"""Offset and length of the fields of a header: name, size, type, link, prefix."""
_TAR_TEXTS = (
    b"", b"../../x.jpg", b"/etc/passwd", b"\xff\xfe.jpg", b"a" * 155, b"00000.jpg", b"x\n.jpg",
    *(bytes([kind]) for kind in b"01234567LKxgXSMVDN"),
)  # fmt: skip


def changed_json(content: Any, chance: random.Random) -> Any:
    """A copy of JSON content with values replaced, names changed, and parts gone or doubled."""
    content = json.loads(json.dumps(content))
    for _ in range(chance.choice((1, 1, 2, 5))):
        holder, name = chance.choice(list(_places(content)) or [({}, "")])
        way = chance.randrange(5)
        if isinstance(holder, dict) and way == 0:
            holder.pop(name, None)
        elif isinstance(holder, dict) and way == 1:
            holder[chance.choice(("type", "x", name.upper(), ""))] = holder.get(name)
        elif way == 2 and len(list(_places(content))) > 1:
            other, other_name = chance.choice(list(_places(content)))
            holder[name] = json.loads(json.dumps(other[other_name]))
        else:
            holder[name] = chance.choice(_STRANGE)
    return content


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every value of JSON content as the object or list that holds it, and where."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for name, value in items:
        yield content, name
        if isinstance(value, dict | list):
            yield from _places(value)


def changed_safetensors(content: bytes, chance: random.Random) -> bytes:
    """The same, of a file of tensors: what its header says, or any bytes."""
    if chance.random() < 0.5:
        return changed_bytes(content, chance)
    length = int.from_bytes(content[:8], "little")
    header = changed_json(json.loads(content[8 : 8 + length]), chance)
    text = json.dumps(header).encode()
    said = len(text) if chance.random() < 0.9 else chance.choice(_NUMBERS)
    return struct.pack("<q", said) + text + content[8 + length :]


# ------------------------------------------------------------------------------------------------
# What is read


@dataclass
class Kind:
    """One kind of files: how a file with something wrong is made, and how it is read."""

    write: Callable[[random.Random], None]
    read: Callable[[], object]


@dataclass
class Tally:
    """What became of the files of one kind."""

    endings: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    """Of the slowest."""
    memory: int = 0
    """Bytes of the largest growth."""
    faults: list[str] = field(default_factory=list)

    def add(self, number: int, outcome: Outcome) -> None:
        """Count one, and keep what is wrong."""
        self.endings[outcome.ending] += 1
        self.seconds = max(self.seconds, outcome.seconds)
        self.memory = max(self.memory, outcome.memory)
        if outcome.ending not in FINE or "\n" in outcome.words:
            self.faults.append(f"{number}: {outcome.ending}: {outcome.words}")
        elif outcome.memory > MEMORY:
            self.faults.append(f"{number}: {outcome.memory:,} bytes")


def picture(size: tuple[int, int], kind: str, **options: Any) -> bytes:
    """An encoded picture of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind, **options)
    return file.getvalue()


def _pictures() -> list[bytes]:
    kinds = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
    plain = [picture((24, 36), kind) for kind in kinds]
    frames = [Image.new("P", (40, 30), number) for number in range(3)]
    animated = io.BytesIO()
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
    return [
        *plain, animated.getvalue(), picture((20, 20), "JPEG", progressive=True),
        picture((20, 20), "TIFF", compression="tiff_lzw"),
    ]  # fmt: skip


def read_samples(reader: Reader, count: int) -> None:
    """Every sample as a loader process reads it."""
    for number in range(count):
        reader.key(number)
        try:
            sample = reader.read(number)
            _see(sample.image)
        except Damaged:
            continue


def _see(encoded: bytes) -> None:
    image = open_image(encoded)
    window = Window(0, 0, image.height, image.width)
    resize_window(image, window, (16, 16), reduced=True)


def _shard(folder: Path) -> Path:
    about = [{"caption": f"a photo of {number} dogs"} for number in range(12)]
    samples = (
        NewSample(image=picture((16, 20), "JPEG"), extension="jpg", about=each, key=f"{number:05d}")
        for number, each in enumerate(about)
    )
    write_tars(folder, samples, samples_per_shard=100)
    return folder / "00000.tar"


def _tars(folder: Path) -> Kind:
    whole = _shard(folder).read_bytes()
    shard = folder / "changed.tar"

    def read() -> None:
        write_index(shard, index_tar(shard))
        summary = read_summary(shard)
        summary.lines(shard)
        read_samples(TarReader(shard, Fields()), summary.num_samples)

    return Kind(lambda chance: _write(shard, changed_tar(whole, chance)), read)


def _streamed(folder: Path) -> Kind:
    kind = _tars(folder)
    url = str(folder / "changed.tar")
    return Kind(kind.write, lambda: [key for key, _ in stream_tar(url)])


def _indexes(folder: Path) -> Kind:
    shard = _shard(folder)
    index = write_index(shard, index_tar(shard))
    whole = index.read_bytes()

    def read() -> None:
        summary = read_summary(shard)
        summary.lines(shard)
        read_samples(TarReader(shard, Fields()), summary.num_samples)

    return Kind(lambda chance: _write(index, changed_safetensors(whole, chance)), read)


def _images(folder: Path) -> Kind:
    wholes, file = _pictures(), folder / "changed"
    return Kind(
        lambda chance: _write(file, changed_bytes(chance.choice(wholes), chance)),
        lambda: _see(file.read_bytes()),
    )


def _recipes(folder: Path) -> Kind:
    whole, file = _recipe_of_a_run(), folder / "recipe.json"

    def make(chance: random.Random) -> None:
        if chance.random() < 0.2:
            _write(file, changed_bytes(json.dumps(whole).encode(), chance))
        else:
            _write(file, json.dumps(changed_json(whole, chance)).encode())

    return Kind(make, lambda: load_recipe(file))


def _recipe_of_a_run() -> Any:
    from frugal.flip.recipes import RECIPES

    return to_json(RECIPES["demo"]())


def _run(folder: Path) -> Path:
    """A run directory with one checkpoint."""
    from frugal.common.checkpoint.store import save_weights

    torch.manual_seed(0)
    weights = {f"model.{name}": torch.randn(4, 3) for name in ("a", "b", "c")}
    return save_weights(folder / "checkpoints", weights, step=20)


def _checkpoints(folder: Path) -> Kind:
    checkpoint = _run(folder)
    files = [checkpoint / "state.json", *checkpoint.glob("*.safetensors")]
    files += [checkpoint.parent / "latest"]
    wholes = {file: file.read_bytes() for file in files}
    state = json.loads(wholes[files[0]])

    def make(chance: random.Random) -> None:
        for file, whole in wholes.items():
            _write(file, whole)
        file = chance.choice(files)
        if file == files[0] and chance.random() < 0.8:
            _write(file, json.dumps(changed_json(state, chance)).encode())
        elif file == files[1]:  # with a checksum that is right
            _write(file, changed_safetensors(wholes[file], chance))
            _write(files[0], json.dumps(_described(state, file)).encode())
        else:
            _write(file, changed_bytes(wholes[file], chance))

    def read() -> None:
        found = find_checkpoint(folder)
        found.tensor_bytes()
        load_weights(found)

    return Kind(make, read)


def _described(state: Any, file: Path) -> Any:
    from frugal.common.checkpoint.store import file_checksum

    entry = state["files"][0] | {"bytes": file.stat().st_size, "crc32": file_checksum(file)}
    return state | {"files": [entry]}


def _lists(folder: Path) -> Kind:
    _write(folder / "a.jpg", picture((16, 20), "JPEG"))
    rows = [f'a.jpg,"a photo, of {number} dogs"' for number in range(30)]
    separators = (",", "\t", ";")
    file = folder / "captions.csv"
    fields = Fields(csv_image="filepath", csv_caption="title")

    def make(chance: random.Random) -> None:
        text = "\n".join(["filepath,title", *rows, ""]).replace(",", chance.choice(separators))
        _write(file, changed_bytes(text.encode(), chance))

    def read() -> None:
        found = open_list(file, fields)
        found.warnings()
        read_samples(found, found.num_samples)

    return Kind(make, read)


def _weights(folder: Path) -> Kind:
    state = {
        "model.a": torch.randn(4, 3),
        "model.b": torch.arange(6),
        "logit_scale": torch.ones(()),
    }
    names = {"w.safetensors": changed_safetensors, "w.pt": changed_bytes, "old.pt": changed_bytes}
    save_file(state, folder / "w.safetensors")
    torch.save({"model": state, "epoch": 3}, folder / "w.pt")
    torch.save({"model": state}, folder / "old.pt", _use_new_zipfile_serialization=False)
    wholes = {name: (folder / name).read_bytes() for name in names}
    chosen = [""]

    def make(chance: random.Random) -> None:
        chosen[0] = chance.choice(list(names))
        _write(folder / chosen[0], names[chosen[0]](wholes[chosen[0]], chance))

    return Kind(make, lambda: read_weights(folder / chosen[0]))


KINDS: dict[str, Callable[[Path], Kind]] = {
    "tars": _tars, "streamed tars": _streamed, "images": _images, "recipes": _recipes,
    "indexes": _indexes, "checkpoints": _checkpoints, "caption lists": _lists, "weights": _weights,
}  # fmt: skip


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def fuzz(name: str, count: int, folder: Path, *, seed: int = 0) -> Tally:
    """Change and read so many files of one kind; the same ones for the same seed."""
    folder = folder / name.replace(" ", "_")
    folder.mkdir()
    kind, tally = KINDS[name](folder), Tally()

    def attempt(number: int) -> Callable[[], object]:
        def act() -> None:
            kind.write(random.Random(f"{seed}/{name}/{number}"))
            kind.read()

        return act

    bounds = Bounds(seconds=20, folders=(folder,))
    logging.getLogger("frugal").setLevel(logging.CRITICAL)
    try:
        for number, outcome in enumerate(
            confined_each([attempt(number) for number in range(count)], bounds)
        ):
            tally.add(number, outcome)
    finally:
        logging.getLogger("frugal").setLevel(logging.NOTSET)
    return tally


def main() -> None:
    """Fuzz every kind, and print a table of Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the usual number of files")
    parser.add_argument("--only", default="", help="one kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    print("| files | changed | read | refused | damaged | faults | slowest, s | memory, MiB |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in [options.only] if options.only else KINDS:
            count = max(1, round(COUNTS[name] * options.share))
            tally = fuzz(name, count, Path(folder), seed=options.seed)
            numbers = [count, *(tally.endings[ending] for ending in FINE), len(tally.faults)]
            cells = [f"{number:,}" for number in numbers]
            cells += [f"{tally.seconds:.1f}", f"{tally.memory / 2**20:.0f}"]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
            for fault in tally.faults[:5]:
                print(fault, file=sys.stderr)
            found[name] = dict(tally.endings) | {"faults": tally.faults}
    if options.json is not None:
        write(options.json, found)


if __name__ == "__main__":
    main()
