r"""Lists of images and captions in CSV and TSV files, row by row.

With tabs every line is a row and quotes are text like any other, as in the lists of CC3M and
YFCC. With commas (semicolons, bars) a text may stand in quotes, as spreadsheets write it, and run
over several lines. Only ``\n`` and ``\r\n`` end a line, or ``\r`` where a file has nothing else.
A row that does not fit the header is one damaged sample, and the next line is read as a new row:
a quote that is never closed costs one row, not those behind it.
"""

from __future__ import annotations

import csv
import io
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from frugal.common.data.damage import PassedOver
from frugal.common.data.samples import Fields, StringTable, caption_text
from frugal.common.data.stores.folder import FileList
from frugal.common.errors import InputError
from frugal.common.files import open_file, reason_of

_SEPARATORS = ("\t", ",", ";", "|")
_MOST_LINES = 256
"""Lines of a row in quotes; where more are without an end, the quote was never closed."""
_LOOKED_FOR = 16
"""Images by which the folder is found that paths are relative to."""
_NAMED = 3

_Row = tuple[int, list[str] | str]
"""Number of the first line of a row, counted from 1, and its columns, or what is wrong."""


def open_list(path: Path, fields: Fields) -> FileList:
    """The images that a CSV or TSV file with a header lists.

    Raises:
        InputError: if the file is no such list.
    """
    rows = _Rows()
    try:
        with io.BufferedReader(open_file(path)) as file:
            lines = _decoded(file)
            layout = _read_header(path, next(lines, None), fields)
            for number, columns in layout.rows(rows.counted(lines)):
                rows.add(number, columns, layout)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({reason_of(error)}); check the path") from None
    base, remark = _find_base(path, rows.files)
    return FileList(
        name=str(path),
        base=str(base),
        files=StringTable.of(rows.files),
        texts=StringTable.of(rows.texts),
        labels=None,
        lines=np.array(rows.lines, np.int64),
        damaged=rows.damaged,
        counted=f"{len(rows.lines):,} rows in {rows.num_lines:,} lines",
        remarks=(*rows.remarks(layout), *([remark] if remark else [])),
        passed_over=rows.passed_over,
    )


@dataclass(frozen=True)
class _Layout:
    """How the rows of a list are divided, as its header says."""

    separator: str
    columns: list[str]
    image: int
    """Place of the column with the path."""
    caption: int
    is_spaced: bool
    """Whether a space follows the separator."""

    def rows(self, lines: Iterator[str]) -> Iterator[_Row]:
        """The rows behind the header, which is line 1."""
        if self.separator == "\t":
            return ((number, line.split("\t")) for number, line in enumerate(lines, 2))
        return self._quoted_rows(lines)

    def _quoted_rows(self, lines: Iterator[str]) -> Iterator[_Row]:
        ahead: deque[str] = deque()  # lines that were read and belong to no row yet
        number = 2
        while (line := ahead.popleft() if ahead else next(lines, None)) is not None:
            if '"' not in line:
                yield number, line.split(self.separator)
                number += 1
                continue
            taken = [line]
            row = self._quoted_row(taken, ahead, lines)
            if isinstance(row, str):
                ahead.extendleft(reversed(taken[1:]))
                del taken[1:]
            yield number, row
            number += len(taken)

    def _quoted_row(
        self, taken: list[str], ahead: deque[str], lines: Iterator[str]
    ) -> list[str] | str:
        """The columns of a row with quotes, or what is wrong; the lines that it takes are added."""

        def pull() -> Iterator[str]:
            yield taken[0] + "\n"
            while len(taken) < _MOST_LINES:
                line = ahead.popleft() if ahead else next(lines, None)
                if line is None:
                    return
                taken.append(line)
                yield line + "\n"

        try:
            columns = next(self._reader(pull()))
        except csv.Error as error:
            is_long = "limit" in str(error)
            return "a text is too long" if is_long else "its quotation marks do not pair up"
        if any(self._is_row(line, like=columns) for line in taken[1:]):
            return "a quotation mark is not closed"
        return columns

    def _reader(self, lines: Iterable[str]) -> Iterator[list[str]]:
        return csv.reader(
            lines, delimiter=self.separator, strict=True, skipinitialspace=self.is_spaced
        )

    def _is_row(self, line: str, *, like: Sequence[str]) -> bool:
        """Whether a line inside of quotes is a row of its own: where others have it is an image."""
        parts = line.split(self.separator)
        if len(parts) < len(self.columns) or len(like) <= self.image:
            return False
        suffix = os.path.splitext(like[self.image].strip())[1].lower()  # noqa: PTH122
        return bool(suffix) and parts[self.image].strip(' "').lower().endswith(suffix)


@dataclass
class _Rows:
    """What is gathered of the rows of a list."""

    files: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    damaged: dict[int, str] = field(default_factory=dict)
    """What is wrong with rows, by their place."""
    passed_over: PassedOver = field(default_factory=PassedOver)
    num_lines: int = 1
    """The header and all others."""
    quoted: int = 0
    """Captions that stand in quotation marks."""
    spaced: int = 0
    """Paths with spaces around them."""

    def counted(self, lines: Iterator[str]) -> Iterator[str]:
        """The lines, counted."""
        for line in lines:
            self.num_lines += 1
            yield line

    def add(self, number: int, columns: list[str] | str, layout: _Layout) -> None:
        """Keep a row: its path and caption, or what is wrong with it."""
        problem = columns if isinstance(columns, str) else ""
        file = text = ""
        if isinstance(columns, list):
            if not any(columns) or not any(map(str.strip, columns)):
                self.passed_over.add("a line without content", f"line {number}")
                return
            if len(columns) != len(layout.columns):
                problem = f"{_counted(len(columns))} instead of {len(layout.columns)}"
            else:
                file, text = columns[layout.image], columns[layout.caption]
        if _has_bad_bytes(text):
            problem, file, text = "its caption is not UTF-8", "", ""
        if problem:
            self.damaged[len(self.lines)] = problem
        self.quoted += text[:1] == '"' and text[-1:] == '"'
        self.spaced += file != (file := file.strip())
        self.lines.append(number)
        self.files.append(file)
        self.texts.append(caption_text(text))

    def remarks(self, layout: _Layout) -> Iterator[str]:
        """What the owner of the list should know, one line each."""
        if self.damaged:
            first = list(self.damaged.items())[:_NAMED]
            named = "; ".join(f"line {self.lines[place]}: {reason}" for place, reason in first)
            more = "; ..." if len(self.damaged) > _NAMED else ""
            yield f"damaged rows: {len(self.damaged):,} ({named}{more})"
        if layout.separator not in "\t,":
            yield f"its columns are taken to be separated by {layout.separator!r}"
        if layout.separator == "\t" and self.quoted:
            yield (
                f"captions in quotation marks: {self.quoted:,}; with tabs between columns the "
                "marks are text and stay"
            )
        if self.spaced:
            yield f"paths with spaces around them, which go: {self.spaced:,}"


def _counted(columns: int) -> str:
    return "1 column" if columns == 1 else f"{columns} columns"


def _has_bad_bytes(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _decoded(file: Iterable[bytes]) -> Iterator[str]:
    """Lines without their ends and without a byte-order mark; bytes that are not UTF-8 escaped."""
    lines = iter(file)
    first = next(lines, None)
    if first is None:
        return
    if b"\r" in first.rstrip(b"\r\n"):  # of an old Macintosh
        whole = b"".join([first, *lines])
        separator = b"\n" if b"\n" in whole else b"\r"
        lines = iter(whole.removesuffix(separator).split(separator))
        first = next(lines)
    yield _line(first.removeprefix(b"\xef\xbb\xbf"))
    for line in lines:
        yield _line(line)


def _line(encoded: bytes) -> str:
    encoded = encoded.removesuffix(b"\n").removesuffix(b"\r")
    return encoded.decode("utf-8", "surrogateescape").replace("\r", " ")


def _read_header(path: Path, header: str | None, fields: Fields) -> _Layout:
    """How the rows are divided.

    Raises:
        InputError: if the header has not the two columns, or one of them twice.
    """
    if header is None:
        raise InputError(f"{path} is empty (0 bytes); copy it again, or leave it out")
    if "\0" in header or _has_bad_bytes(header):
        raise InputError(f"{path} is not UTF-8 text; save it as UTF-8")
    needed = (fields.csv_image, fields.csv_caption)
    options = [fields.csv_separator] if fields.csv_separator else _SEPARATORS
    headers = {separator: _names(header, separator) for separator in options}
    fitting = [s for s, names in headers.items() if set(needed) <= set(names)]
    separator = fitting[0] if fitting else max(headers, key=lambda s: len(headers[s]))
    names = headers[separator]
    for name in needed:
        if names.count(name) != 1:
            what = "two columns" if name in names else "no column"
            raise InputError(
                f"{path} has {what} {name!r} among {names}, its first line; name the columns "
                "there, or set csv-image, csv-caption and csv-separator of --data.fields (of "
                "--fields where shards are checked or converted)"
            )
    return _Layout(
        separator=separator,
        columns=names,
        image=names.index(fields.csv_image),
        caption=names.index(fields.csv_caption),
        is_spaced=f"{separator} " in header,
    )


def _names(header: str, separator: str) -> list[str]:
    try:
        names = (
            header.split("\t")
            if separator == "\t"
            else next(
                csv.reader([header], delimiter=separator, strict=True, skipinitialspace=True), []
            )
        )
    except csv.Error:
        names = header.split(separator)
    return [name.strip() for name in names]


def _find_base(path: Path, files: Sequence[str]) -> tuple[Path, str]:
    """The folder that paths are relative to, by where more of some images are, and a remark."""
    named = [file for file in files if file]
    some = named[:: -(-len(named) // _LOOKED_FOR) or 1]
    missing = [file for file in some if not _is_file(path.parent / file)]
    if not missing:
        return path.parent, ""
    missing_here = [file for file in some if not _is_file(Path(file))]
    if len(missing_here) < len(missing):
        return Path(), (
            "paths are taken relative to the working directory, where "
            f"{len(some) - len(missing_here)} of {len(some)} images that were looked for are; "
            f"{len(some) - len(missing)} are where the list is"
        )
    return path.parent, (
        f"{len(missing)} of {len(some)} images that were looked for are missing, the first is "
        f"{path.parent / missing[0]}"
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False
