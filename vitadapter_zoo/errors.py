"""The errors that the zoo raises on purpose.

Every message is written for the person at the terminal: what was given, what was
expected, and what to do next. The CLI prints it to stderr and exits non-zero.
"""


class ZooError(Exception):
    """Base class: catch this to catch everything the zoo reports on purpose."""


class UnknownModelError(ZooError, ValueError):
    """The catalog has no row of that name."""


class DownloadError(ZooError):
    """A file could not be fetched whole, or is not the file that was published."""


class OfflineError(DownloadError):
    """A file is not in the cache, and the network is away or must not be used."""


class CheckpointError(ZooError):
    """A file is not a checkpoint, or not a checkpoint of the model asked for."""


class UnsafeCheckpointError(CheckpointError):
    """A pickle asks for more than tensors and plain data; none of it was run."""


class ConfigError(ZooError, ValueError):
    """A configuration asks for a network that the zoo does not have."""


class BackendError(ZooError):
    """Another framework is asked for that is missing, broken, or cannot do this."""


class ImageError(ZooError, ValueError):
    """An input is not an image that the network can take."""


class DatasetError(ZooError, ValueError):
    """A data set is absent, damaged, or not one that the model can be measured on."""
