"""``download``, ``cache`` and ``convert``: the files of the models."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vitadapter_zoo import settings
from vitadapter_zoo.catalog import get_row, list_models
from vitadapter_zoo.cli.models import model_names
from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.finder import Found, find
from vitadapter_zoo.text import shown
from vitadapter_zoo.weights import cache
from vitadapter_zoo.weights.source import HubFile

if TYPE_CHECKING:
    from vitadapter_zoo.weights.progress import Report
    from vitadapter_zoo.weights.source import Source

UNITS = {"h": 3600, "d": 86400, "w": 604800}


def chosen_names(names: tuple[str, ...], everything: bool) -> list[str]:
    """Return the given names, or all names of the catalog; exactly one must be requested."""
    if bool(names) == everything:
        raise click.UsageError("name the models, or give --all")
    return list_models() if everything else list(names)


@click.command(
    epilog="\b\nExamples:\n  vitadapter-zoo download adapter-t-deit-3x vit-t-deit-3x\n"
    "  vitadapter-zoo download --all --jobs 4\n"
)
@click.argument("names", nargs=-1, metavar="NAME...", shell_complete=model_names)
@click.option("--all", "everything", is_flag=True, help="Every model of the catalog.")
@click.option(
    "--jobs", type=click.IntRange(1, 16), default=3, show_default=True, help="Parallel downloads."
)
@click.option(
    "--checkpoint", metavar="SOURCE", help="Another source for NAME; needs exactly one NAME."
)
@click.option("--accept-change", is_flag=True, help="Accept a source whose content has changed.")
@click.option("--allow-nonfinite", is_flag=True, help="Accept NaN and infinite weights.")
@click.option("--offline", is_flag=True, help="Never use the network; list what is missing.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def download(
    names: tuple[str, ...],
    everything: bool,
    jobs: int,
    checkpoint: str | None,
    accept_change: bool,
    allow_nonfinite: bool,
    offline: bool,
    quiet: bool,
) -> None:
    """Download and convert NAME... into the cache.

    NAME is a model of the catalog or a repository of the Hub.
    """
    chosen = chosen_names(names, everything)
    if checkpoint and len(chosen) != 1:
        raise click.UsageError("--checkpoint needs exactly one NAME")
    from concurrent.futures import ThreadPoolExecutor

    from vitadapter_zoo.weights import resolve
    from vitadapter_zoo.weights.progress import bars
    from vitadapter_zoo.weights.source import parse

    def fetch(name: str, lines: Callable[[str], Report]) -> list[Path]:
        found = find(name, offline=offline or None, progress=False)
        if found.place is not None:
            if checkpoint:
                raise click.UsageError(f"{name} has weights of its own: leave --checkpoint out")
            return _whole_folder(found, lines, offline)
        source = parse(checkpoint) if checkpoint else resolve.published(found.row)
        return resolve.obtain(
            found.row, source, lines, offline=offline or None, accept_change=accept_change,
            allow_nonfinite=allow_nonfinite,
        )  # fmt: skip

    for name in chosen:
        if "/" not in name and not settings.expanded(name).is_dir():
            get_row(name)  # a mistyped name is an error before the first download
    failures = []
    with bars(not quiet) as lines, ThreadPoolExecutor(jobs) as pool:
        futures = {name: pool.submit(fetch, name, lines) for name in chosen}
        for name, future in futures.items():
            try:
                paths = future.result()
            except ZooError as error:
                failures.append(f"{shown(name)}: {error}")
            else:
                size = sum(path.stat().st_size for path in paths)
                click.echo(f"{name}: {_megabytes(size)}, {paths[0]}")
    if failures:
        raise ZooError("\n".join(failures))


def _whole_folder(found: Found, lines: Callable[[str], Report], offline: bool) -> list[Path]:
    """Return the weights of a saved detector; a repository of the Hub is downloaded."""
    from vitadapter_zoo.publishing.pretrained import fetch_folder, weights_files

    place = found.place
    if isinstance(place, HubFile):
        place = fetch_folder(
            place, settings.home(), lines(str(place)), offline=settings.is_offline(offline or None)
        )
    return weights_files(place) if place is not None else []


@click.group("cache", epilog="\b\nExample:\n  vitadapter-zoo cache list\n")
def cache_group() -> None:
    """Show and clean the cache of converted weights."""


@cache_group.command("path")
def cache_path() -> None:
    """Print the path of the cache."""
    click.echo(settings.home())


@cache_group.command("list")
def cache_list() -> None:
    """List the cached files with their sizes and sources."""
    items = cache.listing()
    for item in items:
        source = item.provenance.source if item.provenance else "-"
        date = item.provenance.date[:10] if item.provenance else "-" * 10
        model = item.entry.weights.parent.name
        size = _megabytes(item.size)
        click.echo(f"{model:<26} {item.state:<10} {size:>11} {date}  {shown(source, 200)}")
    total = _megabytes(sum(item.size for item in items))
    click.echo(f"{len(items)} in {settings.home()}, {total}")


@cache_group.command("verify")
def cache_verify() -> None:
    """Check every file against its checksum; exit 1 if one is damaged."""
    wrong, listed = [], list(cache.listing())
    for item in listed:
        intact = item.provenance is not None and item.entry.is_intact(item.provenance)
        state = "intact" if intact else "unfinished" if item.state == "unfinished" else "DAMAGED"
        click.echo(f"{state:<10} {item.entry.weights}")
        if state == "DAMAGED":
            wrong.append(str(item.entry.weights))
    if not listed:
        click.echo(f"nothing in {settings.home()}")
    if wrong:
        raise click.ClickException(  # exit status 1: the check found damage
            f"{len(wrong)} damaged: {', '.join(wrong)}; the next load converts them again, and "
            "`vitadapter-zoo cache prune` removes them"
        )


@cache_group.command("prune")
@click.option(
    "--older-than", metavar="AGE", help="Also remove complete files that are older: 12h, 30d or 8w."
)
@click.option("--all", "everything", is_flag=True, help="Remove everything.")
def cache_prune(older_than: str | None, everything: bool) -> None:
    """Remove unfinished and damaged files, and complete ones on request."""
    seconds = None
    if older_than:
        found = re.fullmatch(r"(\d+)([hdw])", older_than)
        if not found:
            raise click.UsageError(f"{older_than!r} is not an age: write 12h, 30d or 8w")
        seconds = float(int(found[1]) * UNITS[found[2]])
    removed = cache.prune(seconds, everything=everything)
    for item in removed:
        click.echo(f"removed {item.state} {item.entry.weights} ({_megabytes(item.size)})")
    click.echo(f"{len(removed)} removed, {_megabytes(sum(item.size for item in removed))}")


@click.command(
    epilog="\b\nExamples:\n"
    "  vitadapter-zoo convert weights.pth.tar --model adapter-t-deit-3x\n"
    "  vitadapter-zoo convert mine.safetensors --model vit-t-deit-3x --format mmdet\n"
    "  vitadapter-zoo convert my-model/ --format mmdet\n"
)
@click.argument("source", metavar="SRC")
@click.option(
    "--model",
    "name",
    shell_complete=model_names,
    metavar="NAME",
    help="Load name, see `list`. Not needed for a folder.",
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]))
@click.option(
    "--format", "kind", type=click.Choice(["safetensors", "mmdet"]), default="safetensors",
    show_default=True,
)  # fmt: skip
@click.option("--classes", metavar="A,B,...", help="Names of the classes, if SRC has none.")
@click.option("--allow-nonfinite", is_flag=True, help="Accept NaN and infinite weights.")
@click.option("--offline", is_flag=True, help="Never use the network.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def convert(
    source: str,
    name: str | None,
    out: Path | None,
    dtype: str | None,
    kind: str,
    classes: str | None,
    allow_nonfinite: bool,
    offline: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Convert SRC to safetensors or to mmdet's .pth.

    SRC is a file, a URL, hf://user/repo/file, or a folder that save_pretrained wrote.
    """
    is_folder = settings.expanded(source).is_dir()
    if not is_folder and name is None:
        raise click.UsageError("the network of SRC is not known: give --model NAME, see `list`")
    found = find(settings.expanded(source) if is_folder else str(name), offline=offline or None)
    if is_folder and name not in (None, found.row.name):
        raise click.UsageError(f"{source} holds {found.row.name}: leave --model out")
    suffix = ".pth" if kind == "mmdet" else ".safetensors"
    target = (settings.expanded(out) if out else Path(f"{found.row.name}{suffix}")).absolute()
    if target.exists() and not force:
        raise ZooError(f"{target} exists: give --force to replace it, or another --out")
    import torch

    from vitadapter_zoo.detections.output_files import refuse_inputs
    from vitadapter_zoo.weights import convert as conversion
    from vitadapter_zoo.weights import resolve, timm_files

    paths, where = _sources(source, found, offline, quiet, allow_nonfinite)
    refuse_inputs([target], paths)
    names = tuple(part.strip() for part in classes.split(",")) if classes else None
    if is_folder and names is None:
        names = found.categories
    wanted = getattr(torch, dtype) if dtype else None
    with cache.locked(settings.home(), f"out-{cache.digest(str(target))}"):
        if kind == "mmdet":
            done = conversion.to_mmdet(
                paths, where, found.row, target, dtype=wanted, classes=names,
                allow_nonfinite=allow_nonfinite,
            )  # fmt: skip
        else:
            digest = resolve.source_sha256(paths)
            more, _ = timm_files.referenced_trunk(
                found.row, str(found.place), offline=offline or None, progress=not quiet
            )
            done = conversion.to_safetensors(
                paths, where, found.row, target, sha256=digest, dtype=wanted, classes=names,
                allow_nonfinite=allow_nonfinite, more=more,
            )  # fmt: skip
    cast = ", ".join(f"{count} from {kind}" for kind, count in done.cast.items()) or "none"
    removed = f"; prefixes removed: {', '.join(map(shown, done.removed))}" if done.removed else ""
    click.echo(f"{target}: {_megabytes(target.stat().st_size)}, from a {done.container}")
    click.echo(f"cast: {cast}; filled: {len(done.filled)}; classes: {done.classes}{removed}")


def _sources(
    text: str, found: Found, offline: bool, quiet: bool, allow_nonfinite: bool
) -> tuple[list[Path], str]:
    """Return the local weights files of SRC, and their name for error messages."""
    from vitadapter_zoo.publishing.pretrained import weights_files
    from vitadapter_zoo.weights import resolve
    from vitadapter_zoo.weights.progress import bars
    from vitadapter_zoo.weights.source import LocalFile, parse

    if isinstance(found.place, Path) and settings.expanded(text).is_dir():
        return weights_files(found.place), str(found.place)
    where: Source = parse(text)
    if isinstance(where, LocalFile):
        return resolve.as_they_are(where.path) or [where.path], str(where)
    with bars(not quiet) as lines:
        paths = resolve.obtain(
            found.row, where, lines, offline=offline or None, allow_nonfinite=allow_nonfinite
        )
    return paths, str(where)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
