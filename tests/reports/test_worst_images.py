"""The worst images of an evaluation: which are chosen, and their pictures in the page."""

import base64
import io
from dataclasses import replace
from pathlib import Path

from PIL import Image
from report_scenes import NAME, Scene, as_found, parse, without

from vitadapter_zoo.evaluation.scoring import Annotations
from vitadapter_zoo.evaluation.verdict import Verification, judge
from vitadapter_zoo.reports import report, worst_images


def test_the_worst_images_are_those_with_the_most_mistakes(scene: Scene) -> None:
    first, second, empty = as_found(scene)
    assert not empty.scores
    assert worst_images.worst(judge(NAME, scene.data, [first, second, empty], None)) == []
    stray = replace(
        empty, boxes=second.boxes[:1], scores=[0.8], category_ids=[1], masks=["0"],
    )  # fmt: skip
    found = judge(
        NAME, scene.data, [without(first, 2), without(second, 3), stray], None,
        images=scene.data.folder,
    )  # fmt: skip
    chosen = worst_images.worst(found)
    counted = [(one.image_id, one.objects, one.missed, one.false) for one, _ in chosen]
    assert counted == [
        (second.image_id, len(second.scores), 3, 0),
        (first.image_id, len(first.scores), 2, 0),
        (empty.image_id, 0, 0, 1),
    ]
    for _, pictures in chosen:
        assert isinstance(pictures, worst_images.Pictures)
        for encoded in (pictures.annotations, pictures.detections):
            assert max(Image.open(io.BytesIO(encoded)).size) == worst_images.LONGEST_SIDE


def test_unmatched_names_annotations_and_detections(scene: Scene) -> None:
    first, second, empty = as_found(scene)
    annotations = Annotations(scene.data)
    doubled = replace(  # its first object a second time, as the third detection
        second,
        boxes=[*second.boxes[:2], second.boxes[0], *second.boxes[2:]],
        scores=[0.9, 0.9, 0.8, *second.scores[2:]],
        category_ids=[*second.category_ids[:2], second.category_ids[0], *second.category_ids[2:]],
        masks=[*second.masks[:2], second.masks[0], *second.masks[2:]],
    )
    short = replace(
        first,
        boxes=first.boxes[1:],
        scores=first.scores[1:],
        category_ids=first.category_ids[1:],
        masks=first.masks[1:],
    )
    lost = next(one for one in scene.data.objects if one.image_id == first.image_id).annotation_id
    found = annotations.unmatched([empty, doubled, short], "mask")
    assert [one.missed for one in found] == [(), (), (lost,)]
    assert [one.false for one in found] == [(), (2,), ()]


def test_the_pictures_are_in_the_page(found: Verification, tmp_path: Path) -> None:
    content = report.write(found, tmp_path)
    assert content["worst_images"]
    page = parse(tmp_path / "report.html")
    uris = [address for address in page.addresses if address.startswith("data:image/jpeg;base64,")]
    assert len(uris) == 2 * len(content["worst_images"])
    for uri in uris:
        Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).load()
