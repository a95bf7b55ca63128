"""What all backbones share: four output maps, described as timm describes features."""

from collections.abc import Sequence

from timm.models import FeatureInfo

from vitadapter_zoo.errors import ConfigError

STRIDES = (4, 8, 16, 32)


class Pyramid:
    """Mixin of a backbone whose ``forward`` computes maps at strides 4, 8, 16 and 32.

    Attributes:
        width: channels of every map.
        out_indices: the maps that ``forward`` returns, 0 to 3, ascending.
    """

    width: int
    out_indices: tuple[int, ...] = (0, 1, 2, 3)

    @property
    def feature_info(self) -> FeatureInfo:
        """Describe the returned maps as timm does: ``channels()`` and ``reduction()``."""
        described = [
            {"num_chs": self.width, "reduction": stride, "module": f"norm{index + 1}"}
            for index, stride in enumerate(STRIDES)
        ]
        return FeatureInfo(described, self.out_indices)

    def select(self, out_indices: Sequence[int]) -> None:
        """Make ``forward`` return only these maps.

        Args:
            out_indices: indices of the maps, ascending; negative ones count from the coarsest map.

        Raises:
            ConfigError: none, no such map, or not ascending.
        """
        wanted = tuple(index + 4 if index < 0 else index for index in out_indices)
        if not wanted or list(wanted) != sorted(set(wanted)) or not set(wanted) <= {0, 1, 2, 3}:
            raise ConfigError(
                f"out_indices={list(out_indices)}: give ascending indices of the four maps, 0 "
                "(stride 4) to 3 (stride 32)"
            )
        self.out_indices = wanted
