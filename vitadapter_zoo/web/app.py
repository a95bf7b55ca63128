"""The page of the web demo, and the server that shows it on this machine."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import PIL.Image

from vitadapter_zoo.catalog import COCO_CLASSES, get_row
from vitadapter_zoo.errors import ImageError, ZooError
from vitadapter_zoo.images import read_image
from vitadapter_zoo.web import overlay
from vitadapter_zoo.web.models import Models, Work, available

if TYPE_CHECKING:
    import gradio

    from vitadapter_zoo.detections import Detections
    from vitadapter_zoo.images.images import RGB

LOWEST = 0.05  # score; the slider goes from here to 1
SCORE = 0.3  # of the slider at the beginning, as `predict` has it
QUEUE = 8  # requests that may wait; the next one is refused
MEGABYTES = 20  # of a file
LARGEST_PIXELS = 50_000_000
KEPT = 3600  # seconds that a picture and its result are kept
SESSIONS = 50  # whose results are kept
SAMPLE = "000190.jpg"  # a validation image of the row below
SAMPLE_MODEL = "adapter-n-emoji"

Handler: TypeAlias = Callable[..., tuple[Any, ...]]

START = "Drop a picture, or try the sample. It does not leave this server."


@dataclass(frozen=True)
class Result:
    """The state of a session between two moves of the slider.

    Attributes:
        found: all detections from ``LOWEST`` on.
        image: the picture, reduced for the page, uint8 RGB ``[H, W, 3]``.
        name: of the picture's file, without its ending.
    """

    found: Detections
    image: RGB
    name: str


def build(
    models: Sequence[str] = (), *, device: str = "cpu", work: Work | None = None
) -> gradio.Blocks:
    """Build the page; ``launch`` serves it.

    Args:
        models: folders or names beside those in the cache, see `vitadapter_zoo.web.models`.
        device: where the network computes.
        work: stops the computation before the process exits.

    Raises:
        ZooError: Gradio is not installed, or a name is not a model.
    """
    gr = _gradio()
    offered = Models(available(models), device)
    with gr.Blocks(
        title="vitadapter-zoo", analytics_enabled=False, delete_cache=(KEPT // 6, KEPT)
    ) as page:
        gr.Markdown("# vitadapter-zoo\nObject detection with ViT-Adapter and Mask R-CNN")
        result = gr.State(None, time_to_live=KEPT)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                file = gr.File(label="Picture", file_types=["image"], height=140)
                sample = gr.Button("Try the sample picture")
                model = gr.Dropdown(list(offered.names), value=offered.names[0], label="Model")
                score = gr.Slider(LOWEST, 1, SCORE, step=0.01, label="Lowest score")
                download = gr.DownloadButton("Download COCO JSON", interactive=False)
            with gr.Column(scale=2, min_width=300):
                picture = gr.HTML(overlay.note(START), elem_id="picture", apply_default_css=False)
                table = gr.HTML("", elem_id="table", apply_default_css=False)

        show, detect = _handlers(gr, offered, work or Work())
        outputs = [picture, table, download]
        detection: dict[str, Any] = {
            "fn": detect,
            "inputs": [file, model, score],
            "outputs": [result, *outputs],
            "concurrency_limit": 1,  # the network uses every core
            "concurrency_id": "network",
            "api_visibility": "private",
        }
        file.change(**detection)
        model.change(**detection)
        score.change(
            show, [result, score], outputs, trigger_mode="always_last", show_progress="hidden",
            concurrency_limit=2, api_visibility="private",
        )  # fmt: skip
        sample.click(lambda: _sample(gr), None, file, api_visibility="private")
    page.queue(max_size=QUEUE)
    return page


def launch(
    page: gradio.Blocks,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    megabytes: int = MEGABYTES,
) -> str:
    """Serve the page from a thread of this process.

    Args:
        page: what `build` gives; ``page.close()`` ends the server.
        host: address to listen on; the default is reached from this machine only.
        port: 0 takes a free one.
        megabytes: largest file that is taken.

    Returns:
        The page's URL.

    Raises:
        ZooError: the port or the address cannot be used.
    """
    gr = _gradio()
    chosen = _free_port(host, port)
    fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    _, url, _ = page.launch(
        server_name=host,
        server_port=chosen,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        inbrowser=False,
        ssr_mode=False,
        enable_monitoring=False,
        max_file_size=megabytes << 20,
        state_session_capacity=SESSIONS,
        footer_links=[],
        theme=gr.themes.Base(font=fonts[0], font_mono=fonts[1]),
    )
    return str(url)


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Create a temporary folder for uploads; must be called before Gradio is imported."""
    folder = tempfile.TemporaryDirectory(prefix="vitadapter-zoo-", ignore_cleanup_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = folder.name
    return folder


def _handlers(gr: Any, offered: Models, work: Work) -> tuple[Handler, Handler]:
    """Create the handlers for the slider, and for a new picture or model."""

    def show(kept: Result | None, lowest: float) -> tuple[Any, ...]:
        if kept is None:
            return gr.skip(), gr.skip(), gr.skip()
        with work.request():
            return _shown(gr, kept, lowest)

    def detect(path: str | None, name: str, lowest: float) -> tuple[Any, ...]:
        if path is None:
            return (None, *_said(gr, START))
        try:
            with work.request():
                kept = _detected(offered, name, Path(path))
                return (kept, *_shown(gr, kept, lowest))
        except ZooError as error:
            return (None, *_said(gr, str(error)))

    return show, detect


def _detected(offered: Models, name: str, path: Path) -> Result:
    rgb = _read(path)
    found = offered.predict(name, rgb, LOWEST)
    found.image = None  # a session keeps the reduced picture only
    return Result(found, overlay.reduced(rgb), path.stem)


def _read(path: Path) -> RGB:
    """Return the picture, unless it has too many pixels for the memory.

    Raises:
        ImageError: it has more than ``LARGEST_PIXELS``, or is not a picture.
    """
    try:
        with PIL.Image.open(path) as header:  # reads no pixels
            pixels = header.width * header.height
    except PIL.Image.DecompressionBombError:
        pixels = LARGEST_PIXELS + 1
    except (OSError, ValueError, SyntaxError):
        pixels = 0  # OpenCV decides, and says why not
    if pixels > LARGEST_PIXELS:
        raise ImageError(
            f"The picture has more than {LARGEST_PIXELS // 1_000_000} million pixels. Make it "
            "smaller and try again."
        )
    try:
        return read_image(path)
    except ImageError as error:
        raise ImageError(
            f"{path.name} is not a picture that can be read. JPEG, PNG, WebP, BMP and TIFF can."
        ) from error


def _shown(gr: Any, kept: Result, lowest: float) -> tuple[Any, ...]:
    """Return overlay, table and download of the detections above the slider's score."""
    found = kept.found.filter(lowest)
    own = None if found.categories == COCO_CLASSES else range(1, len(found.categories) + 1)
    results = found.to_coco(_image_id(kept.name), category_ids=own)
    folder = Path(tempfile.mkdtemp(dir=_folder(gr)))
    target = folder / f"{kept.name}.json"
    target.write_text(json.dumps(results), encoding="utf-8")
    return (
        overlay.picture(found, kept.image),
        overlay.table(found),
        gr.DownloadButton(value=str(target), interactive=True),
    )


def _said(gr: Any, message: str) -> tuple[Any, ...]:
    return overlay.note(message), "", gr.DownloadButton(value=None, interactive=False)


def _image_id(name: str) -> int:
    """Return the number in the file's name, as `predict --coco-json` does, else 1."""
    return int(name) if name.isascii() and name.isdecimal() else 1


def _sample(gr: Any) -> str | None:
    """Copy the sample picture, because Gradio serves only files in its own folder."""
    files = get_row(SAMPLE_MODEL).data_files
    if files is None:
        return None
    return shutil.copy(files[1] / SAMPLE, tempfile.mkdtemp(dir=_folder(gr)))


def _folder(gr: Any) -> str:
    folder = Path(gr.utils.get_upload_folder())
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def _free_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0.

    Raises:
        ZooError: it is in use, or the host is not an address of this machine.
    """
    import socket

    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ZooError(
            f"cannot listen on {host} port {port} ({error.strerror}): choose another --port or "
            "--host"
        ) from error


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise ZooError("the web demo needs Gradio: pip install 'vitadapter-zoo[web]'") from error
    return gradio
