"""The comparison of two implementations: equal results agree, and every difference is found."""

import torch

from vitadapter_zoo import Detections
from vitadapter_zoo.backends.comparison import Difference, detection_differences, worst


def detections(shift: float = 0.0, score: float = 0.0, pixels: int = 0) -> Detections:
    """Two objects in a 100 x 100 image, one large and one small, changed a little."""
    masks = torch.zeros(2, 100, 100, dtype=torch.bool)
    masks[0, 10:60, 10:60] = True
    masks[1, 80:85, 80:85] = True
    masks[1, 80, 80 : 80 + pixels] = False
    boxes = torch.tensor([[10.0, 10, 60, 60], [80, 80, 85, 85]])
    scores = torch.tensor([0.9, 0.5 + score])
    return Detections(boxes + shift, scores, torch.tensor([3, 5]), masks)


def failing(found: list[Difference]) -> list[str]:
    return [stage.stage for stage in found if not stage.agrees]


def test_the_same_detections_do_not_differ() -> None:
    found = detection_differences(detections(), detections())
    assert [stage.measured for stage in found] == [0, 0, 0, 0]


def test_every_kind_of_difference_is_reported() -> None:
    reference = detections()
    assert failing(detection_differences(detections(shift=0.3), reference)) == ["detections"]
    assert failing(detection_differences(detections(score=0.01), reference)) == ["detections"]
    assert failing(detection_differences(detections(pixels=1), reference)) == []
    assert failing(detection_differences(detections(pixels=2), reference)) == ["masks"]
    fewer = reference.filter(0.6)
    alone = detection_differences(fewer, reference)[0]
    assert alone == Difference("detections", 1.0, 0.0)
    other_class = Detections(
        reference.boxes, reference.scores, torch.tensor([3, 6]), reference.masks
    )
    assert detection_differences(other_class, reference)[0].measured == 2


def test_nothing_found_on_both_sides_agrees() -> None:
    nothing = detections().filter(1.0)
    assert failing(detection_differences(nothing, nothing)) == []
    assert detection_differences(detections(), nothing)[0].measured == 2


def test_the_worst_of_several_images_counts() -> None:
    images = [[Difference("input", value, 0.5)] for value in (0.1, 0.7, 0.2)]
    assert worst(images) == [Difference("input", 0.7, 0.5)]
