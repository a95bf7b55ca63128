"""Comparing a network with the original's stored outputs, stage by stage."""

from dataclasses import dataclass

import numpy as np
import torch
from standins import DATA, PHOTO

from vitadapter_zoo.backends.comparison import Stages, matches, native_stages
from vitadapter_zoo.models import MaskRCNN


@dataclass(frozen=True)
class Parity:
    """Differences on the reference photo.

    Attributes:
        shapes: whether every shape, size and scale factor equals the original's.
        input: largest difference of the sampled input values.
        features: for each map, the largest sampled difference relative to the tensor's largest
            magnitude.
        moments: for each map, the largest difference of mean and standard deviation, relative to
            the tensor's largest magnitude.
        proposals: share of the original's proposals with a counterpart.
        unmatched: number of detections of either network without a counterpart.
        mask_iou: smallest mask IoU over the matched detections.
        rle_equal: share of the matched masks whose RLE is byte-identical to the original's.
    """

    shapes: bool
    input: float
    features: dict[str, float]
    moments: dict[str, float]
    proposals: float
    unmatched: int
    mask_iou: float
    rle_equal: float

    def failures(self) -> list[str]:
        """List the differences beyond the project's tolerances; empty if the networks agree."""
        checks = {
            "shapes, sizes and scale factors differ": self.shapes,
            f"input differs by {self.input:.1e}": self.input < 1e-6,
            f"only {self.proposals:.1%} of the proposals match": self.proposals >= 0.99,
            f"{self.unmatched} detections have no counterpart": self.unmatched == 0,
            f"a mask has IoU {self.mask_iou:.4f}": self.mask_iou > 0.99,
        }
        for kind, values in (("values", self.features), ("moments", self.moments)):
            for name, difference in values.items():
                checks[f"{kind} of {name} differ by {difference:.1e}"] = difference < 1e-4
        return [failure for failure, passed in checks.items() if not passed]


def compare(model: MaskRCNN) -> Parity:
    """Run the model on the reference photo and compare it with the original's stored outputs."""
    return compare_stages(native_stages(model, PHOTO), model.row.name)


def compare_stages(stages: Stages, row: str) -> Parity:
    """Compare an implementation's results on the reference photo with the stored outputs."""
    from hotcoco import mask as coco_mask

    stored = np.load(DATA / "outputs" / f"{row}.npz")
    detections = stages.detections
    named = {"input": stages.input}
    named |= {f"backbone.{index}": x for index, x in enumerate(stages.backbone)}
    named |= {f"neck.{index}": x for index, x in enumerate(stages.neck)}
    shapes = all(list(x.shape) == stored[f"{name}.shape"].tolist() for name, x in named.items())
    shapes &= list(stages.resized) == stored["meta.img_shape"][:2].tolist()
    shapes &= list(stages.original) == stored["meta.ori_shape"][:2].tolist()
    shapes &= np.array_equal(np.array(stages.scale, np.float32), stored["meta.scale_factor"])

    def sampled(name: str) -> float:
        values = named[name].flatten()[torch.from_numpy(stored[f"{name}.index"])].numpy()
        return float(np.abs(values - stored[f"{name}.value"]).max())

    def moments(name: str) -> float:
        mean, std, largest = stored[f"{name}.moments"]
        x = named[name].double()
        return float(max(abs(x.mean() - mean), abs(x.std(correction=0) - std)) / largest)

    features = {
        name: sampled(name) / float(stored[f"{name}.moments"][2])
        for name in named
        if name != "input"
    }
    reference = torch.from_numpy(stored["proposals"])
    proposal_matches = matches(
        stages.proposals, stages.proposal_scores, reference[:, :4], reference[:, 4]
    )
    # Boxes of each class are shifted far away, so that only boxes of the same class match.
    apart = 1e4
    found = matches(
        detections.boxes + apart * detections.labels[:, None],
        detections.scores,
        torch.from_numpy(stored["boxes"] + apart * stored["labels"][:, None]),
        torch.from_numpy(stored["scores"]),
    )
    coco = detections.to_coco(0)
    ious, equal = [], []
    for index, (counts, match) in enumerate(zip(stored["mask_rle"], found.tolist(), strict=True)):
        if match < 0:
            continue
        original = {"size": [int(side) for side in stages.original], "counts": str(counts)}
        ours = coco[match]["segmentation"]
        a, b = (coco_mask.decode(rle).astype(bool) for rle in (original, ours))
        union = (a | b).sum()
        assert a.sum() == stored["mask_area"][index]
        ious.append(float((a & b).sum() / union) if union else 1.0)
        equal.append(ours["counts"] == str(counts))
    unmatched = int((found < 0).sum()) + len(detections) - int((found >= 0).sum())
    return Parity(
        shapes=bool(shapes),
        input=sampled("input"),
        features=features,
        moments={name: moments(name) for name in features},
        proposals=float((proposal_matches >= 0).double().mean()),
        unmatched=unmatched,
        mask_iou=min(ious, default=0.0),
        rle_equal=sum(equal) / max(len(equal), 1),
    )
