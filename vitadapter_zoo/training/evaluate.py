"""The AP of a detector in training, by the verifier's own network path and scorer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitadapter_zoo.errors import ImageError
from vitadapter_zoo.evaluation.dataset import Dataset
from vitadapter_zoo.evaluation.evaluator import Evaluator, read, stream
from vitadapter_zoo.evaluation.run import ImageResult
from vitadapter_zoo.evaluation.scoring import KINDS, Annotations
from vitadapter_zoo.models import MaskRCNN

if TYPE_CHECKING:
    from accelerate import Accelerator


def evaluate(model: MaskRCNN, dataset: Dataset, accelerator: Accelerator) -> dict[str, float]:
    """Box and mask AP on a data set; every process computes a part of the images.

    Args:
        model: in evaluation mode.
        dataset: from ``read_dataset``.
        accelerator: says which part is this process's.

    Returns:
        ``box_ap``, ``box_ap50``, ``mask_ap`` and ``mask_ap50`` in points, 0..100; the same in
        every process.

    Raises:
        ImageError: an image is missing, damaged, or of another size than annotated.
    """
    results: list[ImageResult] = []

    def keep(result: ImageResult) -> None:
        if result.skipped:
            raise ImageError(f"{result.skipped}; restore the file")
        results.append(result)

    mine = dataset.images[accelerator.process_index :: accelerator.num_processes]
    evaluator = Evaluator(
        model, dataset.category_ids(model.categories), ignore_exif=dataset.ignore_exif
    )
    stream(evaluator, (read(image) for image in mine), keep)
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        results = gather_object(results)
    annotations = Annotations(dataset)
    table = annotations.tabulate(results)
    figures: dict[str, float] = {}
    for kind in KINDS:
        scores = annotations.score(table, kind).figures
        figures[f"{kind}_ap"] = max(0.0, 100 * scores["AP"])
        figures[f"{kind}_ap50"] = max(0.0, 100 * scores["AP50"])
    return figures
