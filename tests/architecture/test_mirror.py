"""Where every module of common is tested, so that whoever changes one finds its tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import ROOT

COMMON = ROOT / "packages/common/src/frugal/common"
TESTS = ROOT / "tests"
ELSEWHERE = {
    "checkpoint/host_copy.py": "common/checkpoint/test_background.py",
    "checkpoint/writer.py": "common/checkpoint/test_background.py",
    "checkpoint/commit.py": "common/checkpoint/test_store.py",
    "checkpoint/tensor_bytes.py": "common/weights/test_runs.py",
    "compare.py": "common/report/test_compare.py",
    "comparison/budgets.py": "common/test_compare_methods.py",
    "comparison/entries.py": "common/test_compare_methods.py",
    "comparison/jobs.py": "common/test_compare_methods.py",
    "comparison/options.py": "common/test_compare_methods.py",
    "comparison/outcomes.py": "common/test_compare_methods.py",
    "comparison/pages.py": "common/test_compare_methods.py",
    "comparison/results.py": "common/test_compare_methods.py",
    "comparison/running.py": "common/test_compare_methods.py",
    "comparison/trials.py": "common/test_compare_methods.py",
    "contracts.py": "architecture/test_sixth_method.py",
    "data/benchmark_layout.py": "common/evaluation/test_task.py",
    "data/damage.py": "common/data/test_stream.py",
    "data/decoding.py": "common/data/test_transforms.py",
    "data/patterns.py": "common/data/test_sources.py",
    "data/sample_transform.py": "common/data/test_stream.py",
    "data/stored_images.py": "common/data/test_labeled.py",
    "data/stored_vectors.py": "cit/test_stored.py",
    "data/stores/class_folders.py": "common/data/test_config.py",
    "data/stores/grouping.py": "common/data/stores/test_tar.py",
    "data/stores/image_walk.py": "common/data/stores/test_folder.py",
    "data/stores/streamed_tar.py": "common/data/stores/test_tar.py",
    "data/stores/tfrecord.py": "common/data/test_samples.py",
    "data/stores/url.py": "common/data/test_resampled.py",
    "data/vocabularies.py": "common/data/test_tokenizers.py",
    "data/word_pieces.py": "common/data/test_tokenizers.py",
    "data/writing.py": "common/scenes/test_writing.py",
    "demo.py": "common/weights/test_demos.py",
    "engine/accelerate.py": "distributed/test_engines_agree.py",
    "engine/calibration.py": "cluster_masking/test_in_training.py",
    "engine/deepspeed.py": "distributed/test_engines_agree.py",
    "engine/engine.py": "distributed/test_engines_agree.py",
    "engine/evaluator.py": "common/evaluation/test_results_kept.py",
    "engine/metrics.py": "common/engine/test_logger.py",
    "engine/rehearsal.py": "faults/test_bad_input.py",
    "engine/saving.py": "faults/test_crash_and_resume.py",
    "engine/step.py": "distributed/test_engines_agree.py",
    "engine/training.py": "faults/test_crash_and_resume.py",
    "engine/signals.py": "faults/test_crash_and_resume.py",
    "errors.py": "faults/test_bad_input.py",
    "evaluation/class_names.py": "common/evaluation/test_zero_shot.py",
    "evaluation/cli.py": "common/test_evaluate.py",
    "evaluation/features.py": "common/evaluation/test_linear_probe.py",
    "evaluation/linear_classifier.py": "common/evaluation/test_linear_probe.py",
    "evaluation/measure.py": "common/test_evaluate.py",
    "evaluation/metrics.py": "common/evaluation/test_retrieval.py",
    "evaluation/multi_label.py": "common/evaluation/test_task.py",
    "evaluation/predictions.py": "common/evaluation/test_zero_shot.py",
    "evaluation/prompts.py": "common/evaluation/test_zero_shot.py",
    "evaluation/remarks.py": "common/evaluation/test_zero_shot.py",
    "evaluation/sugarcrepe.py": "common/evaluation/test_compositional.py",
    "evaluation/task_labels.py": "common/evaluation/test_suites.py",
    "export.py": "common/weights/test_save.py",
    "import_weights.py": "common/weights/test_import_weights.py",
    "models/batch_norm.py": "common/transfer/test_segmentation.py",
    "models/blocks.py": "common/models/test_vit.py",
    "models/clip.py": "parity/test_open_clip.py",
    "models/finite.py": "common/weights/test_files.py",
    "models/fit.py": "common/checkpoint/test_init_from.py",
    "models/flax_names.py": "flip/test_convert.py",
    "models/from_transformers.py": "common/weights/test_load.py",
    "models/image_encoder.py": "common/weights/test_import_weights.py",
    "models/in_words.py": "common/weights/test_import_weights.py",
    "models/layout.py": "common/models/test_attention.py",
    "models/named.py": "common/models/test_vit_config.py",
    "models/pretrained.py": "cit/test_golden_text.py",
    "models/pretrained_models.py": "cit/test_golden_text.py",
    "models/pretrained_towers.py": "cit/test_golden_text.py",
    "models/same_function.py": "common/checkpoint/test_init_from_other_function.py",
    "models/text.py": "common/models/test_vit.py",
    "models/torch_files.py": "faults/test_hostile_files.py",
    "models/weight_names.py": "common/weights/test_import_weights.py",
    "objectives/gradient_cache.py": "common/objectives/test_contrastive.py",
    "old_names.py": "common/test_runs_before.py",
    "quiet_transformers.py": "common/weights/transformers/test_clip.py",
    "report/examples_of_model.py": "common/report/test_examples.py",
    "scenes/captions.py": "common/scenes/test_world.py",
    "scenes/compositional.py": "common/scenes/test_world.py",
    "scenes/distractors.py": "common/scenes/test_world.py",
    "scenes/drawing.py": "common/scenes/test_world.py",
    "scenes/samples.py": "common/scenes/test_writing.py",
    "scenes/settings.py": "common/scenes/test_writing.py",
    "shards.py": "common/data/test_shards.py",
    "train.py": "end_to_end/test_flip_run.py",
    "transfer/classifier.py": "common/transfer/test_classification.py",
    "transfer/masked_folder.py": "common/transfer/test_segmentation_data.py",
    "transfer/pixels.py": "common/transfer/test_segmentation.py",
    "transfer/segmenter.py": "common/transfer/test_segmentation.py",
    "transfer/tasks.py": "milan/test_transfer_tasks.py",
    "weights/encoder_config.py": "common/weights/test_import_weights.py",
    "weights/folding.py": "common/weights/transformers/test_clip.py",
    "weights/image_states.py": "common/weights/test_files.py",
    "weights/image_towers.py": "common/weights/test_files.py",
    "weights/library.py": "common/weights/test_libraries.py",
    "weights/model_card.py": "common/weights/test_import_weights.py",
    "weights/openai.py": "common/weights/test_load.py",
    "weights/torchscript.py": "common/weights/test_load.py",
    "weights/transformers/clip_normalizer.py": "common/weights/transformers/test_tokenizer.py",
    "weights/transformers/config_files.py": "common/weights/test_import_weights.py",
    "weights/transformers/library.py": "common/weights/transformers/test_clip.py",
    "weights/transformers/upernet.py": "milan/test_export.py",
    "weights/transformers/vision_text.py": "common/weights/transformers/test_clip.py",
    "weights/transformers/vit.py": "common/weights/test_import_weights.py",
    "weights/transformers/vit_mae.py": "milan/test_export.py",
    "weights/wrapped.py": "common/weights/test_files.py",
    "weights/written.py": "common/weights/test_import_weights.py",
}
"""Modules that no file of their own name tests, by the file that does: what they do shows there,
through the parts that use them."""


def mirrored(module: str) -> bool:
    """Whether tests/common has ``test_NAME.py`` or ``test_NAME_SUBJECT.py`` at the same place."""
    folder, _, name = module.removesuffix(".py").rpartition("/")
    mirror = TESTS / "common" / folder
    if (mirror / f"test_{name}.py").is_file():
        return True
    # test_compare_methods.py is the mirror of compare_methods.py, and no part of compare.py's
    others = {f"test_{file.stem}.py" for file in (COMMON / folder).glob("*.py")}
    return any(file.name not in others for file in mirror.glob(f"test_{name}_*.py"))


def modules() -> list[str]:
    files = (file.relative_to(COMMON) for file in sorted(COMMON.rglob("*.py")))
    return [file.as_posix() for file in files if not file.name.startswith("__")]


@pytest.mark.parametrize("module", modules())
def test_every_module_has_a_mirror_or_a_place_where_it_is_tested(module: str) -> None:
    where = ELSEWHERE.get(module)
    assert mirrored(module) or where, (
        f"add a test_*.py of this name to tests/common/{Path(module).parent}, or say where "
        f"{module} is tested"
    )
    assert not (mirrored(module) and where), f"{module} has a mirror now; take it off the list"
    assert where is None or (TESTS / where).is_file(), f"{where} is not there any more"


def test_the_list_names_no_module_that_is_gone() -> None:
    assert ELSEWHERE.keys() <= set(modules())
