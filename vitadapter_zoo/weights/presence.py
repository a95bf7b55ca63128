"""Check whether weights can be obtained, before torch is imported.

Importing torch takes seconds. Without a network, a command that needs a download should fail at
once instead.
"""

from __future__ import annotations

from urllib.parse import urlparse

from vitadapter_zoo import settings
from vitadapter_zoo.catalog import Row
from vitadapter_zoo.errors import OfflineError
from vitadapter_zoo.weights import cache
from vitadapter_zoo.weights.network import no_route
from vitadapter_zoo.weights.source import HubFile, LocalFile, Source, Url


def check(row: Row, source: Source, *, offline: bool | None = None) -> None:
    """Refuse weights that are not on this machine while the network cannot, or must not, be used.

    A server that is reached may still refuse; ``resolve.obtain`` finds that out.

    Args:
        row: the row that the weights are for.
        source: where they come from.
        offline: True never uses the network; None asks the environment.

    Raises:
        OfflineError: they are not in a cache, and the network is away or this is offline mode.
    """
    if isinstance(source, LocalFile):
        return
    place = cache.entry(row.name, str(source))
    if place.read() is not None:
        return
    without_network = settings.is_offline(offline)
    if isinstance(source, HubFile):
        from vitadapter_zoo.weights import hub

        hub.check_cached(source, offline=without_network)
    elif without_network:
        raise offline_error(row, source, place)
    else:
        reason = no_route(source.url)
        if reason:
            raise OfflineError(
                f"cannot download {source}: {urlparse(source.url).hostname} cannot be reached "
                f"({reason}) and it is not in the cache; check the connection and the address and "
                "try again, or pass the path of a local file as the checkpoint"
            )


def offline_error(row: Row, source: Url, place: cache.Entry) -> OfflineError:
    """Create the error for a URL that is not in the cache in offline mode."""
    return OfflineError(
        f"{row.name} from {source} is not in the cache {place.home}, and this is offline mode: "
        f"run `vitadapter-zoo download {row.name}` with a connection, or pass the path of a "
        "local file as the checkpoint"
    )
