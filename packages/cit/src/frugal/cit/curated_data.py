"""The part of a recipe that lets a run choose its own pairs; nothing here imports torch.

Source: Xu et al., "CiT: Curation in Training for Effective Vision-Language Data",
arXiv:2301.02241.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from frugal.cit.metadata import Metadata
from frugal.common.data.config import PairData
from frugal.common.errors import InputError
from frugal.common.ranges import Count, Range

if TYPE_CHECKING:
    from pathlib import Path

    from frugal.common.contracts import Stream
    from frugal.common.recipe import Recipe
    from frugal.common.run import Run


_Cosine = Annotated[float, Range(least=-1, most=1, words="must be a cosine, between -1 and 1")]
_LeastShare = Annotated[
    float, Range(above=0, most=1, hint="leave it out to let the threshold alone decide")
]


@dataclass(frozen=True, kw_only=True)
class CuratedData(PairData):
    """Image-text pairs that the text tower picks from a pool while it is trained.

    Every ``period`` updates captions of the pool are scanned, without their images, and those near
    to a class of the metadata are kept until there are as many pairs as the next ``period`` updates
    need; these are trained on in drawn order. The pool is scanned in its global order, from where
    the last curation ended.
    """

    metadata: Metadata = field(default_factory=Metadata)
    period: Count = 100
    """Updates between two curations."""
    threshold: _Cosine = 0.55
    """A caption is kept if its cosine with the nearest class is greater. Features are those of the
    text tower before its projection."""
    min_ratio: _LeastShare | None = None
    """Least share kept of a unit: where fewer captions are above the threshold, this share of the
    nearest ones is kept in their place. Without it the threshold alone decides."""
    keep: Literal["set", "list"] = "set"
    """set: a pair comes once in a period; list: as often as it was met."""
    scan: Count = 2_048
    """Captions of a unit, about which the least share is decided (published: twice the batch of a
    GPU); the same on any number of processes."""
    tags: tuple[str, ...] = ()
    """Entries of fields.caption that are comma-separated tags: whenever they are read, their order
    and what stands between them are drawn anew."""
    max_scanned: Count | None = None
    """Captions that one curation may scan; without it ten times the pool."""
    when_short: Literal["stop", "best"] = "stop"
    """What to do where that is not enough. stop: end the run with the best similarity seen. best:
    warn, and fill up with the nearest of the captions that were not kept."""
    background: bool = False
    """Curate for the next period while this one is trained on, with the weights from its start.
    Published runs choose with the newest weights: it changes which pairs are chosen."""

    shared_state: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resampled_samples is not None:
            raise InputError(
                "data.resampled_samples is given, but a curation reads captions at any place of a "
                "pool, which a stream has not; copy the shards to a disk and leave it out"
            )
        self._check_tags()

    def _check_tags(self) -> None:
        unknown = next((name for name in self.tags if name not in self.fields.caption), None)
        if unknown is not None:
            raise InputError(
                f"data.tags names {unknown!r}, which is none of data.fields.caption "
                f"{self.fields.caption}; name it as it stands there"
            )
        if self.tags and not self.fields.separate:
            raise InputError(
                "data.tags is given, but which field a caption comes from is known only with "
                "data.fields.separate; set it"
            )

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe whose model reads no captions."""
        if self.tokenizer is None or not hasattr(recipe.model, "text"):
            raise InputError(
                "curation asks the text tower which captions are near, but this recipe has none; "
                "choose a model with two towers and a tokenizer"
            )

    @property
    def text_names(self) -> tuple[str, ...]:
        """What the texts of a sample are called, where every field is a text of its own."""
        if not self.fields.separate:
            return ()
        return tuple(field.removeprefix("json.") for field in self.fields.caption)

    @property
    def tag_places(self) -> tuple[int, ...]:
        """Which texts of a sample are tags."""
        return tuple(self.fields.caption.index(name) for name in self.tags)

    def build(
        self,
        recipe: Recipe,
        run: Run,
        *,
        first_sample: int,
        state: dict[str, Any],
        engine: Any,
    ) -> Stream:
        """The micro-batches of this process from ``first_sample`` on; they ask the engine's model.

        Raises:
            InputError: if the pool cannot be read or is too small, or no class is wanted.
        """
        from frugal.cit.curated_stream import build_stream

        return build_stream(
            self, recipe, run, first_sample=first_sample, state=state, engine=engine
        )

    def report(self, run_dir: Path) -> list[tuple[str, str]]:
        """Titles and HTML of what the report of a run tells about its data."""
        from frugal.cit.report import sections_of

        return sections_of(run_dir)
