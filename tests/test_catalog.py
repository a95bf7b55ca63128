"""The catalog: the published tables, and finding rows."""

import pytest

from vitadapter_zoo import UnknownModelError, get_row, list_models
from vitadapter_zoo.catalog import (
    COCO_CLASSES,
    DINOV2,
    IMAGENET_MEAN,
    IMAGENET_STD,
    PUBLISHED,
    ROWS,
)

# (name, box AP, mask AP, printed gains), read off the two tables by hand.
TABLE_1 = [
    ("adapter-t-deit-1x", 41.1, 37.5, None),
    ("vit-t-deit-3x", 40.2, 37.0, None),
    ("adapter-t-deit-3x", 46.0, 41.0, (5.8, 4.0)),
    ("vit-s-deit-3x", 44.0, 39.9, None),
    ("adapter-s-deit-3x", 48.2, 42.8, (4.2, 2.9)),
    ("vit-b-deit-3x", 45.8, 41.3, None),
    ("adapter-b-deit-3x", 49.6, 43.6, (3.8, 2.3)),
    ("adapter-b-uniperceiver-3x", 51.2, 45.3, None),
    ("vit-l-augreg-3x", 48.3, 43.3, None),
    ("adapter-l-augreg-3x", 52.1, 46.0, (3.8, 2.7)),
]
TABLE_2 = ["adapter-s-deit-3x", "adapter-s-deit-3x-nofpn"]


def test_the_tables_have_twelve_rows_of_eleven_checkpoints() -> None:
    assert list_models(table=1) == [name for name, *_ in TABLE_1]
    assert list_models(table=2) == TABLE_2
    assert sum(len(row.tables) for row in ROWS) == 12
    assert len(ROWS) == len({row.checkpoint_url for row in ROWS}) == 11


def test_dinov2_rows_have_a_table_of_their_own() -> None:
    figures = {row.name: (row.box_ap, row.mask_ap, row.parameters) for row in DINOV2}
    assert figures == {
        "adapter-s-dinov2-3x": (51.5, 45.6, 48),
        "adapter-b-dinov2-3x": (54.1, 47.8, 120),
        "adapter-l-dinov2-3x": (55.3, 49.0, 348),
    }
    assert list_models(table=4) == list_models(pretraining="dinov2") == list(figures)
    assert list_models()[len(ROWS) :][:3] == list(figures)
    for row in DINOV2:
        # L's configuration trains with 127.5, but is evaluated with these.
        assert (row.mean, row.std) == (IMAGENET_MEAN, IMAGENET_STD)
        assert (row.plain, row.box_gain) == (None, None)  # no plain ViT with this pretraining
    sizes = [row.file_bytes or 0 for row in DINOV2]
    # The file holds float32 values and a header of at most a few hundred KB.
    assert [round(size / 1e6) for size in sizes] == [193, 485, 1395]
    assert len({row.sha256 for row in DINOV2}) == 3


def test_what_was_made_here_comes_last_and_is_in_no_published_table() -> None:
    assert list_models() == [row.name for row in PUBLISHED] + ["adapter-n-emoji"]
    assert list_models(table=3) == list_models(size="n") == ["adapter-n-emoji"]
    assert [row.name for row in ROWS if row.made_here] == []
    row = get_row("adapter-n-emoji")
    assert row.made_here
    assert set(row.classes) < set(COCO_CLASSES)


@pytest.mark.parametrize(("name", "box", "mask", "gains"), TABLE_1)
def test_figures_and_computed_gains_are_the_printed_ones(
    name: str, box: float, mask: float, gains: tuple[float, float] | None
) -> None:
    row = get_row(name)
    assert (row.box_ap, row.mask_ap) == (box, mask)
    assert (row.box_gain, row.mask_gain) == (gains or (None, None))


def test_every_row_says_where_its_files_are() -> None:
    for row in PUBLISHED:
        stem = row.config.removesuffix(".py")
        assert row.checkpoint_url.rpartition("/")[2].startswith(f"{stem}.pth")
        assert row.log_url is None or row.log_url.endswith(f"{stem}.log")
        assert row.pretraining_url.startswith("https://")


def test_criteria_narrow_the_list() -> None:
    assert list_models("vit-*") == [
        "vit-t-deit-3x",
        "vit-s-deit-3x",
        "vit-b-deit-3x",
        "vit-l-augreg-3x",
    ]
    assert list_models(schedule="1X") == ["adapter-t-deit-1x"]
    assert list_models(fpn=False) == ["adapter-s-deit-3x-nofpn"]
    assert list_models(size="l", backbone="vit-adapter-l", table=1) == ["adapter-l-augreg-3x"]
    assert list_models(pretraining="Uni-Perceiver") == ["adapter-b-uniperceiver-3x"]
    assert len(list_models(pretraining="DeiT")) == 8
    assert list_models("nothing*") == []


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(UnknownModelError, match="did you mean adapter-l-augreg-3x"):
        get_row("adapter-l-augreg")
    with pytest.raises(UnknownModelError, match="`vitadapter-zoo list`"):
        get_row("")


def test_lists_of_patterns_and_exclusion() -> None:
    both = ["vit-t-deit-3x", "adapter-l-augreg-3x"]
    assert list_models(["vit-t-*", "adapter-l-augreg-*"]) == both
    assert list_models(("vit-*",), exclude_filters="*-deit-*") == ["vit-l-augreg-3x"]
    assert list_models("adapter-s-d*", exclude_filters=["*nofpn", "*dinov2*"]) == [
        "adapter-s-deit-3x"
    ]
    assert list_models([]) == []
    assert list_models(exclude_filters="*") == []
