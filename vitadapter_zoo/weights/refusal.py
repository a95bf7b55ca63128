"""Why a torch file was refused, and advice what to do."""

from vitadapter_zoo.errors import UnsafeCheckpointError
from vitadapter_zoo.text import quoted
from vitadapter_zoo.weights.pickle_values import RefusedError

# Functions that no saved object needs: a file that names one was made to run a command.
HOSTILE = (
    "_codecs", "_functools", "_io", "_operator", "_pickle", "_posixsubprocess", "asyncio", "bdb",
    "builtins", "cProfile", "cloudpickle", "code", "codecs", "commands", "ctypes", "dill",
    "doctest", "ensurepip", "functools", "idlelib", "importlib", "io", "joblib", "linecache",
    "marshal", "multiprocessing", "nt", "numpy", "operator", "os", "pdb", "pickle", "pip",
    "platform", "posix", "profile", "pty", "pydoc", "requests", "runpy", "shutil", "signal",
    "site", "socket", "subprocess", "sys", "tempfile", "timeit", "torch", "trace", "types",
    "urllib", "webbrowser",
)  # fmt: skip
# Classes of these libraries that people save beside their weights.
OWN = ("torch.nn.", "numpy.core.multiarray.", "numpy._core.multiarray.", "numpy.ndarray")


def refusal(origin: str, error: RefusedError) -> UnsafeCheckpointError:
    """Describe what was found, and advise: a saved object can be saved again as tensors."""
    start = f"{origin} was refused: "
    module = error.name.partition(".")[0]
    own_object = error.name and (module not in HOSTILE or error.name.startswith(OWN))
    if not own_object:
        detail = (
            f"a checkpoint is a pickle of tensors and plain data, and this is not ({error})"
            if error.name
            else str(error)
        )
        return UnsafeCheckpointError(
            f"{start}{detail}. Nothing in it was run. Get the file from its publisher again"
        )
    if error.first:
        what = f"it holds a whole Python object, {quoted(error.name)}, instead of tensors"
        saved = "torch.save(torch.load(FILE, weights_only=False).state_dict(), 'weights.pth')"
    else:
        what = f"beside tensors and plain data it holds an object: {error!s}"
        saved = (
            "checkpoint = torch.load(FILE, weights_only=False); torch.save({'state_dict': "
            "checkpoint['state_dict']}, 'weights.pth')"
        )
    return UnsafeCheckpointError(
        f"{start}{what}. Nothing in it was run. If you made the file or trust its author, save its "
        f"tensors alone where that class is installed, and load the result: {saved}"
    )
