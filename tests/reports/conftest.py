"""A small evaluation that the tests of the reports share."""

from typing import Any

import pytest
import scenes
from report_scenes import NAME, Scene

from vitadapter_zoo import MaskRCNN
from vitadapter_zoo.evaluation.dataset import coco_paths, read_dataset
from vitadapter_zoo.evaluation.evaluator import Evaluator, read
from vitadapter_zoo.evaluation.run import ImageResult
from vitadapter_zoo.evaluation.verdict import Verification, judge


@pytest.fixture(scope="session")
def scene(small: MaskRCNN, tmp_path_factory: Any) -> Scene:
    model = small
    root = scenes.write_coco(tmp_path_factory.mktemp("coco"), model, 3)
    data = read_dataset(*coco_paths(root))
    evaluator = Evaluator(model, data.category_ids(model.categories))
    results = []
    for image in data.images:
        prepared = evaluator.prepare(read(image))
        assert not isinstance(prepared, ImageResult)
        results.append(evaluator.finish(prepared, evaluator.detect(prepared)))
    return Scene(root, data, model, tuple(results))


@pytest.fixture(scope="session")
def found(scene: Scene) -> Verification:
    return judge(NAME, scene.data, scene.results, (46.0, 41.0), images=scene.data.folder)
