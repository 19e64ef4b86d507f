"""Which members of a tar are one sample: webdataset's rule, and what is done where it fails."""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from frugal.common.data.damage import PassedOver
from frugal.common.data.samples import printable

_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_METADATA = re.compile(r"__[^/]*__($|/)")
_IMAGES = frozenset(
    {
        *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff"),
        *("ppm", "pgm", "pbm", "pnm", "avif", "jp2", "heic", "ico", "tga"),
    }
)
"""Last parts of the extensions of pictures, whether or not a recipe reads them."""

_MOST_ALIKE = 64
"""Samples of one key that are compared with the next; a tar of a million would never end."""

APART = "samples whose members lie apart were joined"
DOTTED = (
    "samples were told apart at the last dot of their names: at the first one, as webdataset does "
    "it, several images would be one sample"
)
FORMATS = "samples hold images of several formats; the first that the data's fields name is read"
COMPOUND = (
    "samples have their image under a compound extension, which is read by its last part unless "
    "the data's fields name all of it"
)
SEVERAL = (
    "samples hold several images of one format under compound extensions; name the one to read "
    "in --data.fields.image, as it stands behind the key"
)
REPEATED = "samples have the key of an earlier one of the same tar, as where two tars were joined"
UNPAIRED = (
    "samples are an image alone or lack one, and no sample holds an image and anything else: the "
    "names before the first dot differ, perhaps in capitals or in how accents are written; give "
    "an image and its text the same name and folder"
)


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member by webdataset's rule: at the first dot of the file's name.

    None for members that belong to no sample: webdataset's ``__meta__`` files, names without
    an extension, and hidden files (macOS leaves ``._name`` files behind in tars).
    """
    if _METADATA.match(name) or name.rpartition("/")[2].startswith("."):
        return None
    match = _KEY_AND_EXTENSION.fullmatch(name)
    return (match[1], match[2].lower()) if match else None


_LONGEST_HEADER = 1 << 24
"""Bytes of a name or of extended headers, which are read at once."""
LARGEST_MEMBER = 1 << 40
"""Bytes of a member that a stream is read on for; to skip more takes days even at its end."""
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip


def refuse_size(header: tarfile.TarInfo) -> None:
    """Refuse a header whose size would lead backward, or into more memory than there is.

    Raises:
        tarfile.HeaderError: as for a header that is none.
    """
    most = _LONGEST_HEADER if header.type in _EXTENDED else LARGEST_MEMBER
    is_read_over = header.type in (*_EXTENDED, tarfile.GNUTYPE_SPARSE)
    if header.size < 0 or (is_read_over and header.size > most):
        raise tarfile.InvalidHeaderError(f"a size of {header.size} bytes")  # type: ignore[attr-defined]


def is_plain(member: tarfile.TarInfo) -> bool:
    """Whether the bytes of a member lie in the tar as they are, one after the other."""
    return member.isreg() and not member.issparse()


def reason_without_sample(member: tarfile.TarInfo) -> str | None:
    """Why a member that is no file, or that :func:`split_name` does not split, is left out.

    None for folders.
    """
    name = member.name
    if member.issparse():
        return "sparse members, which only a stream of the tar can read; write it without --sparse"
    if not member.isreg():
        return None if member.isdir() else "links and other members that are no files"
    if name.rpartition("/")[2].startswith("."):
        return "hidden members, whose names begin with a dot"
    if _METADATA.match(name):
        return "metadata of webdataset (__name__)"
    return "members without an extension"


def _is_image(extension: str) -> bool:
    return extension.rpartition(".")[2] in _IMAGES


@dataclass
class Group:
    """The members of one sample, by their numbers in the order in which they lie in the tar."""

    key: str
    members: dict[str, int] = field(default_factory=dict)
    """By extension."""
    others: list[int] = field(default_factory=list)
    """Members whose extension another one has already."""
    is_doubled: bool = False
    """Whether it is not clear which of its members, or of another's, are the sample."""
    is_joined: bool = False
    """Whether its members lie apart."""

    @property
    def numbers(self) -> list[int]:
        """All of them."""
        return sorted([*self.members.values(), *self.others])


def group_members(names: Sequence[str], starts: Collection[int] = ()) -> Grouping:
    """Put the members of a whole tar together to samples.

    Neighbors of one key are a sample. Members of that key further behind are joined with it where
    it has none of their extensions; else they are a sample of their own, as in webdataset. Where
    neighbors have the same extension too, nobody knows which of them belong together: they are
    marked as doubled, and count as the samples that they may have been.

    Args:
        names: of all members that :func:`split_name` splits, in the order of the tar.
        starts: numbers of the members with which another tar begins.
    """
    grouping = Grouping(names)
    run: Group | None = None
    for number, name in enumerate(names):
        parts = split_name(name)
        assert parts is not None
        key, extension = parts
        if run is None or run.key != key or number in starts:
            if run is not None:
                grouping.add(run)
            run = Group(key)
        if extension not in run.members:
            run.members[extension] = number
            continue
        run.is_doubled = True
        run.others.append(number)
    if run is not None:
        grouping.add(run)
    grouping.finish()
    return grouping


def count_doubled(names: Iterable[str]) -> int:
    """How many samples some members are that have one key: as many as an image's name comes."""
    return max(Counter(name for name in names if _is_image(name.lower())).values(), default=1)


class Grouping:
    """The samples of a tar, and what is to be told about how they came about."""

    def __init__(self, names: Sequence[str]) -> None:
        self.groups: list[Group] = []
        self._names = names
        self.remarks = PassedOver()
        self._of_key: dict[str, list[Group]] = {}

    def add(self, run: Group) -> None:
        """Join members that lie together with those of their key that came before."""
        if run.is_doubled:
            self.groups += self._doubled(run)
            return
        before = self._of_key.setdefault(run.key, [])
        fitting = [
            group
            for group in before[:_MOST_ALIKE]
            if not group.is_doubled and not run.members.keys() & group.members.keys()
        ]
        if not fitting:
            before.append(run)
            self.groups.append(run)
            if len(before) > 1:
                self.remarks.add(REPEATED, printable(run.key))
            return
        for group in fitting:
            group.is_doubled = len(fitting) > 1
        fitting[0].members.update(run.members)
        fitting[0].is_joined = True

    def _doubled(self, run: Group) -> list[Group]:
        """The samples that members of one key may have been, the first of each name together."""
        groups = [
            Group(run.key, is_doubled=True)
            for _ in range(count_doubled(self._names[number] for number in run.numbers))
        ]
        met = Counter[str]()
        for number in run.numbers:
            name = self._names[number]
            groups[min(met[name], len(groups) - 1)].others.append(number)
            met[name] += 1
        return groups

    def finish(self) -> None:
        """Tell samples apart at the last dot where the first one joins several; and look at all."""
        for group in self.groups:
            if group.is_joined and not group.is_doubled:
                self.remarks.add(APART, printable(group.key))
        compound = [group for group in self.groups if any("." in name for name in group.members)]
        if compound:
            self._split(compound)
        self._remark_on_members()

    def _split(self, compound: list[Group]) -> None:
        keys = Counter(middle for group in compound for middle in {*map(_middle, group.members)})
        least = max(2, len(compound) / 2)

        def recurs(middle: str) -> bool | None:
            return None if len(compound) == 1 else keys[middle] >= least

        split = {
            id(group): parts
            for group in compound
            if not group.is_doubled and (parts := split_group(group, self._names, recurs))
        }
        if not split:
            return
        for parts in split.values():
            for part in parts:
                self.remarks.add(DOTTED, printable(part.key))
        parts_of = [split.get(id(group), [group]) for group in self.groups]
        self.groups = sorted(
            (group for parts in parts_of for group in parts), key=lambda group: group.numbers[0]
        )

    def _remark_on_members(self) -> None:
        """Remark on samples of which a reader might take another member than its owner thinks."""
        with_image: list[str] = []
        without: list[str] = []
        both = False
        for group in self.groups:
            if group.is_doubled:
                continue
            key = printable(group.key)
            images = [name for name in group.members if _is_image(name)]
            plain = [name for name in images if "." not in name]
            if len(plain) > 1:
                self.remarks.add(FORMATS, f"{key}: {', '.join(plain)}")
            elif images and not plain:
                several = len({name.rpartition(".")[2] for name in images}) < len(images)
                self.remarks.add(SEVERAL if several else COMPOUND, f"{key}: {', '.join(images)}")
            both = both or (bool(images) and len(images) < len(group.members))
            (with_image if images else without).append(key)
        if with_image and without and not both:
            example = f"{with_image[0]} and {without[0]}"
            self.remarks.add(UNPAIRED, example, count=len(self.groups))


def _middle(extension: str) -> str:
    return extension.rpartition(".")[0]


def split_group(
    group: Group, names: Sequence[str] | Mapping[int, str], recurs: Callable[[str], bool | None]
) -> list[Group]:
    """The samples that a group of webdataset's rule would hide; [] where it is one sample.

    ``IMG_2020.01.02.jpg`` and ``IMG_2020.01.03.jpg`` are two photographs, while ``7.before.jpg``
    and ``7.after.jpg`` belong together: there the part between the dots is a word, which other
    samples have too.

    Args:
        group: the members of a key.
        names: of all members, by number.
        recurs: whether most keys have members with such a middle part; None if that is not known.
    """
    lasts = Counter(name.rpartition(".")[2] for name in group.members)
    if max(lasts.values()) < 2 or not any("." in name for name in group.members):
        return []
    parts: dict[str, Group] = {}
    for extension, number in group.members.items():
        middle, _, last = extension.rpartition(".")
        key = names[number].rpartition(".")[0]
        parts.setdefault(middle, Group(key)).members[last] = number
    with_image = [middle for middle, part in parts.items() if any(map(_is_image, part.members))]
    own_members_only = "" in parts and "" not in with_image
    if own_members_only or len(with_image) < 2:
        return []
    if all(_is_word(middle, recurs(middle)) for middle in parts if middle):
        return []
    return list(parts.values())


def _is_word(middle: str, recurs: bool | None) -> bool:
    """Whether the middle of a name is part of a compound extension rather than of the key."""
    if any(part.isdigit() for part in middle.split(".")):
        return False
    if recurs is None:
        return not any(character.isdigit() for character in middle)
    return recurs
