"""How a detector around a timm model is built: one dataclass, read from JSON. No torch."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from vitadapter_zoo.errors import ConfigError, ZooError
from vitadapter_zoo.text import number_in, range_error

PAPER, DINOV3 = "paper", "dinov3"
ADAPTERS = (PAPER, DINOV3)
DINOV3_DROP_PATH = 0.3
LONGEST = 200  # characters of a name
MOST_PERIODS = 1024
SHA256_DIGITS = 64

# Whole numbers and their ranges. Those of the trunk may be absent: timm's own are used then.
TRUNK_NUMBERS = {"dim": (32, 8192), "depth": (4, 128), "heads": (1, 256)}
NUMBERS = {
    "stem_width": (8, 512),
    "neck_width": (16, 1024),
    "box_width": (16, 8192),
    "mask_convs": (1, 16),
    "anchor_scale": (1, 64),
    "regions": (1, 8192),
    "finest_scale": (1, 1024),
}
MOST_DROP_PATH = 0.9
PERIODS = (1e-6, 1e9)


@dataclass(frozen=True, kw_only=True)
class TimmDetector:
    """The network of a Mask R-CNN around a vision transformer of timm.

    A saved detector has it in its ``config.json``. The defaults of the neck and the heads are those
    of the published networks.

    Attributes:
        trunk: name of timm, with or without its tag, ``"vit_small_patch16_dinov3.lvd1689m"``.
        adapter: ``"paper"`` (injectors and extractors) or ``"dinov3"`` (extractors only).
        frozen: the trunk has no gradients and stays in evaluation mode.
        windows: 14x14 windows in all blocks but the last of each quarter; the paper's adapter only.
        drop_path: stochastic-depth rate of the adapter, and of a trunk that is not frozen; 0..0.9.
        dim: width of the trunk's tokens, 32..8192; None, as the next two, for timm's own.
        depth: number of blocks, 4..128.
        heads: heads of the trunk's attention, 1..256.
        stem_width: width of the spatial prior's stem, 8..512.
        neck_width: channels of the neck's maps, 16..1024.
        box_width: width of the box head's hidden layers, 16..8192.
        mask_convs: 3x3 convolutions in the mask head, 1..16.
        anchor_scale: side of the square anchor in strides, 1..64.
        regions: proposals per image that the box and mask losses use, 1..8192.
        finest_scale: boxes below twice this size in pixels are pooled at stride 4; 1..1024.
        weights: where the trunk's pretrained weights came from: a name of timm, or a file's; None
            for a trunk that was trained from scratch.
        sha256: of that file.
        license: of those weights, as timm or the Hub names it; None where neither does.
        stored: whether a saved folder holds the trunk's weights. Otherwise they are read from
            ``weights``, and have to be the file with ``sha256``.
        periods: the rotary embedding's periods where they are not those that timm computes.
    """

    trunk: str
    adapter: str = PAPER
    frozen: bool = False
    windows: bool = False
    drop_path: float = 0.0
    dim: int | None = None
    depth: int | None = None
    heads: int | None = None
    stem_width: int = 64
    neck_width: int = 256
    box_width: int = 1024
    mask_convs: int = 4
    anchor_scale: int = 8
    regions: int = 512
    finest_scale: int = 56
    weights: str | None = None
    sha256: str | None = None
    license: str | None = None
    stored: bool = True
    periods: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        """What errors, reports and files call the network."""
        return f"{self.trunk}-{self.adapter}-adapter"

    @property
    def described(self) -> str:
        """The backbone in words."""
        whose = "DINOv3's adapter" if self.adapter == DINOV3 else "ViT-Adapter"
        return f"{whose} around timm's {self.trunk}"

    @property
    def is_resized(self) -> bool:
        """Whether the trunk has other sizes than timm's of that name."""
        return (self.dim, self.depth, self.heads) != (None, None, None)

    def record(self) -> dict[str, Any]:
        """The settings as plain data for JSON."""
        found = asdict(self)
        if self.periods is not None:
            found["periods"] = list(self.periods)
        return found


def read(content: object, where: str, kind: type[ZooError]) -> TimmDetector:
    """Read the settings from JSON and check each.

    Args:
        content: parsed JSON.
        where: what errors call the file.
        kind: class of the errors.

    Raises:
        ZooError: of the class ``kind``, with the setting, its value and its range.
    """
    if not isinstance(content, dict):
        raise range_error(where, "network", content, "an object", kind)
    known = {field.name for field in fields(TimmDetector)}
    foreign = sorted(set(content) - known)
    if foreign:
        raise range_error(where, "network", foreign[0], "an object of settings that this version "
                          "knows: " + ", ".join(sorted(known)), kind)  # fmt: skip
    absent = sorted({"trunk", "adapter", "frozen", "stored"} - set(content))
    if absent:
        raise range_error(where, f"network.{absent[0]}", None, "given", kind)
    settings = dict(content)
    if isinstance(settings.get("periods"), list):
        settings["periods"] = tuple(settings["periods"])
    check(TimmDetector(**settings), f"{where}: network", kind)
    # JSON has one kind of number: 4.0 is a whole one too.
    for key in (*TRUNK_NUMBERS, *NUMBERS):
        if settings.get(key) is not None:
            settings[key] = int(settings[key])
    return TimmDetector(**settings)


def check(
    network: TimmDetector, where: str = "TimmDetector", kind: type[ZooError] = ConfigError
) -> None:
    """Check every setting.

    Raises:
        ZooError: of the class ``kind``, with the setting, its value and its range.
    """
    values = asdict(network)
    for key in ("trunk", "weights", "license"):
        _check_text(values, key, where, kind, optional=key != "trunk")
    if network.adapter not in ADAPTERS:
        raise range_error(where, "adapter", network.adapter, "'paper' or 'dinov3'", kind)
    for key in ("frozen", "windows", "stored"):
        if not isinstance(values[key], bool):
            raise range_error(where, key, values[key], "true or false", kind)
    number_in(values, "drop_path", 0, MOST_DROP_PATH, where=where, kind=kind)
    given = {key: span for key, span in TRUNK_NUMBERS.items() if values[key] is not None}
    for key, (low, high) in (NUMBERS | given).items():
        number_in(values, key, low, high, where=where, kind=kind, whole=True)
    _check_hash(network.sha256, where, kind)
    _check_periods(network.periods, where, kind)
    _check_together(network, where, kind)


def _check_text(
    values: dict[str, Any], key: str, where: str, kind: type[ZooError], *, optional: bool
) -> None:
    value = values[key]
    if value is None and optional:
        return
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST or not value.isprintable():
        raise range_error(where, key, value, f"a text of 1 to {LONGEST} characters", kind)


def _check_hash(value: object, where: str, kind: type[ZooError]) -> None:
    if value is None:
        return
    if (
        not isinstance(value, str)
        or len(value) != SHA256_DIGITS
        or set(value) - set("0123456789abcdef")
    ):
        raise range_error(where, "sha256", value, "64 hexadecimal digits in lower case", kind)


def _check_periods(values: object, where: str, kind: type[ZooError]) -> None:
    if values is None:
        return
    if not isinstance(values, tuple) or not 0 < len(values) <= MOST_PERIODS:
        raise range_error(where, "periods", values, f"1 to {MOST_PERIODS} numbers", kind)
    for index, value in enumerate(values):
        key = f"periods[{index}]"
        number_in({key: value}, key, *PERIODS, where=where, kind=kind)


def _check_together(network: TimmDetector, where: str, kind: type[ZooError]) -> None:
    """Refuse settings that exclude each other."""
    if network.windows and network.adapter == DINOV3:
        raise range_error(where, "windows", True, "false for DINOv3's adapter, which runs its "
                          "trunk as it is", kind)  # fmt: skip
    if not network.stored and not (network.frozen and network.weights and network.sha256):
        raise range_error(where, "stored", False, "true unless the trunk is frozen and weights and "
                          "sha256 say which its weights are", kind)  # fmt: skip
