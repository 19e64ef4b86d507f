"""Where files are opened: every module that does so reads what may be anything, and is on a list.

What is read whole goes through ``files.py``, which bounds it. A module that opens, unpacks or
parses files itself is named below with what keeps it safe; ``tests/faults/test_hostile_files.py``
tries them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from support import ROOT

PACKAGES = ROOT / "packages"
_BY_NAME = {"open", "safe_open", "load_file", "ZipFile", "Unpickler", "ParquetFile"}
_BY_METHOD = {
    "read_text", "read_bytes", "open", "ZipFile", "TarFile", "Unpickler", "ParquetFile",
    "read_schema", "from_pretrained", "decompress", "gopen", "urlopen", "read_array",
}  # fmt: skip
_LOADERS = {"torch", "np", "numpy", "json", "pickle", "gzip", "bz2", "lzma"}
SAFE: dict[str, str] = {
    # what is read by a library that verifies it, behind a bound of ours
    "common/files.py": "the one place that bounds what is read whole",
    "common/models/torch_files.py": "weights_only, and refuse_swelling",
    "common/weights/files.py": "safetensors, and load_torch",
    "common/weights/torchscript.py": "an unpickler of tensors alone, and refuse_swelling",
    "common/checkpoint/store.py": "safetensors, and checksums in blocks",
    "common/checkpoint/tensor_bytes.py": "safetensors verifies the header first",
    "common/data/stores/index.py": "safetensors, and _refuse_lies",
    "common/evaluation/bootstrap.py": "safetensors, and parse_json",
    "common/evaluation/features.py": "safetensors",
    "common/models/from_transformers.py": "refuse_larger, and transformers without code of models",
    "cit/curation_files.py": "pyarrow, and parse_json",
    "cit/trained_pairs.py": "pyarrow, and parse_json",
    "cit/yfcc.py": "without pickles; a member of at most LARGEST_FILE; line by line",
    "clipa/published_weights.py": "without pickles, and refuse_swelling",
    "flip/archive_files.py": "unpacked a MiB at a time, no further than a shape says",
    "flip/stored_arrays.py": "the same",
    "flip/t5x_archive.py": "the same",
    # data, whose faults are counted
    "common/data/decoding.py": "Pillow's limit of pixels, named formats",
    "common/data/jpeg.py": "a picture that it has drawn itself",
    "common/data/subset.py": "shards, whose keys are in their index",
    "common/embed.py": "safetensors",
    "common/data/stored_vectors.py": "safetensors",
    "clipa/prune_pairs.py": "shards, whose captions are read by data/samples.py",
    "common/data/samples.py": "without pickles, of a member that was bounded",
    "common/data/stores/image_walk.py": "the first bytes of a text",
    "common/data/stores/streamed_tar.py": "refuse_size, and LARGEST_FILE for a sample",
    "common/data/stores/tar.py": "refuse_size, and LARGEST_FILE for a member",
    "common/transfer/masked_folder.py": "Pillow's limit of pixels, one format",
    # folders of transformers, whose code is never run
    "common/data/vocabularies.py": "trust_remote_code=False; open_clip's own vocabulary",
    "common/data/tokenizers.py": "the same",
    "common/weights/transformers/vision_text.py": "trust_remote_code=False, refuse_larger",
    "common/weights/transformers/config_files.py": "only what was written here is read back",
    "common/weights/transformers/tokenizer.py": "only what was written here is read back",
    "common/weights/transformers/upernet.py": "only what was written here is read back",
    "common/weights/transformers/vit.py": "only what was written here is read back",
    "common/weights/transformers/vit_mae.py": "only what was written here is read back",
    # what is ours, the system's, or as long as a run
    "cit/published_dual.py": "facts, which a tower has parsed",
    "common/models/pretrained.py": "facts, which were read by parse_json or are in a recipe",
    "common/models/pretrained_models.py": "facts, which were read by parse_json or are in a recipe",
    "common/models/same_function.py": "facts, which a tower has parsed",
    "common/distributed.py": "/proc",
    "common/ports.py": "/proc",
    "common/checkpoint/host_copy.py": "/proc and /sys",
    "common/checkpoint/background.py": "what the writer that it started says",
    "common/checkpoint/commit.py": "syncs what was written here",
    "common/checkpoint/manifest.py": "digests in blocks",
    "common/installed.py": "the sources of this package",
    "common/checkpoint/writer.py": "what its trainer says, and what it wrote itself",
    "common/engine/engine.py": "/proc",
    "common/run.py": "/proc",
    "common/engine/deepspeed.py": "of read_text, with sentences of its own",
    "common/engine/logger.py": "metrics and digests, line by line with parse_json",
    "common/plan/report.py": "carried by this package",
    "common/evaluation/class_names.py": "carried by timm",
    "common/evaluation/task_labels.py": "carried by this package",
    "common/evaluation/remote.py": "a server that was asked for",
    # readers of shards, which are opened by the modules above
    "clipa/word_counts.py": "a Reader",
    "common/data/config.py": "a Reader",
    "common/data/stream.py": "a Reader",
    "common/shards.py": "a Reader",
}
"""Modules that read files themselves, and what bounds them."""


def reads(tree: ast.AST) -> Iterator[str]:
    """Calls that read a file, or parse what may be one's content; not those that only write."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or _only_writes(call):
            continue
        function = call.func
        if isinstance(function, ast.Name) and function.id in _BY_NAME:
            yield function.id
        elif isinstance(function, ast.Attribute):
            owner = function.value.id if isinstance(function.value, ast.Name) else ""
            is_loader = owner in _LOADERS and function.attr in ("load", "loads")
            if is_loader or (function.attr in _BY_METHOD and owner != "os"):
                yield f"{owner or '...'}.{function.attr}"


def _only_writes(call: ast.Call) -> bool:
    modes = [*call.args, *(word.value for word in call.keywords if word.arg == "mode")]
    texts = [mode.value for mode in modes if isinstance(mode, ast.Constant)]
    return any(
        isinstance(text, str) and text[:1] in "wax" and len(text) < 4 for text in texts if text
    )


def modules() -> dict[str, list[str]]:
    found = {}
    for file in sorted(PACKAGES.glob("*/src/**/*.py")):
        name = file.relative_to(PACKAGES).as_posix().partition("/src/frugal/")[2]
        if calls := sorted(set(reads(ast.parse(file.read_text())))):
            found[name] = calls
    return found


def test_every_module_that_reads_files_itself_is_on_the_list() -> None:
    found = modules()
    added = {name: calls for name, calls in found.items() if name not in SAFE}
    assert not added, "read with files.py, or name them in SAFE and in tests/faults"
    assert not SAFE.keys() - found.keys(), "these read no files any more"


def test_a_call_that_reads_is_found_and_one_that_writes_is_not() -> None:
    code = "torch.load(f); path.open(); open(p, 'rb'); safe_open(p); path.open('w'); os.open(p)"
    assert sorted(reads(ast.parse(code))) == ["open", "path.open", "safe_open", "torch.load"]


def test_only_one_module_unpickles_and_only_one_loads_with_torch() -> None:
    calls = {name: set(found) for name, found in modules().items()}
    assert [n for n in calls if "torch.load" in calls[n]] == ["common/models/torch_files.py"]
    assert not [n for n in calls if {"pickle.load", "pickle.loads"} & calls[n]]
