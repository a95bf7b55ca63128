"""``download``, ``cache``, ``convert`` and ``card``: files fetched, kept, turned and described."""

from __future__ import annotations

import re
from pathlib import Path

import click

from vitadapter_zoo import settings
from vitadapter_zoo.catalog import ROWS, get_row, list_models
from vitadapter_zoo.errors import ZooError
from vitadapter_zoo.weights import cache

UNITS = {"h": 3600, "d": 86400, "w": 604800}


def _names(names: tuple[str, ...], everything: bool) -> list[str]:
    if bool(names) == everything:
        raise click.UsageError("name the models, or give --all")
    return list_models() if everything else [get_row(name).name for name in names]


@click.command(
    epilog="\b\nExamples:\n  vitadapter-zoo download adapter-t-deit-3x vit-t-deit-3x\n"
    "  vitadapter-zoo download --all --jobs 4\n"
)
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("--all", "everything", is_flag=True, help="Every model of the catalog.")
@click.option("--jobs", type=click.IntRange(1, 16), default=3, show_default=True, help="At a time.")
@click.option("--checkpoint", metavar="SOURCE", help="Another source for the one NAME.")
@click.option("--accept-change", is_flag=True, help="Take a source whose content has changed.")
@click.option("--offline", is_flag=True, help="Only say what is missing.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def download(
    names: tuple[str, ...],
    everything: bool,
    jobs: int,
    checkpoint: str | None,
    accept_change: bool,
    offline: bool,
    quiet: bool,
) -> None:
    """Fetch and convert NAME... into the cache."""
    chosen = _names(names, everything)
    if checkpoint and len(chosen) != 1:
        raise click.UsageError("--checkpoint goes with one NAME")
    from concurrent.futures import ThreadPoolExecutor

    from vitadapter_zoo.weights import resolve
    from vitadapter_zoo.weights.progress import bars
    from vitadapter_zoo.weights.source import parse

    failures = []
    with bars(not quiet) as lines, ThreadPoolExecutor(jobs) as pool:
        futures = {}
        for name in chosen:
            row = get_row(name)
            source = parse(checkpoint) if checkpoint else resolve.published(row)
            futures[name] = pool.submit(
                resolve.obtain, row, source, lines, offline=offline or None,
                accept_change=accept_change,
            )  # fmt: skip
        for name, future in futures.items():
            try:
                paths = future.result()
            except ZooError as error:
                failures.append(f"{name}: {error}")
            else:
                size = sum(path.stat().st_size for path in paths)
                click.echo(f"{name}: {_megabytes(size)}, {paths[0]}")
    if failures:
        raise ZooError("\n".join(failures))


@click.group("cache", epilog="\b\nExample:\n  vitadapter-zoo cache list\n")
def cache_group() -> None:
    """What is kept on this machine."""


@cache_group.command("path")
def cache_path() -> None:
    """Print the cache's directory."""
    click.echo(settings.home())


@cache_group.command("list")
def cache_list() -> None:
    """List the files with their sizes and sources."""
    items = cache.listing()
    for item in items:
        source = item.provenance.source if item.provenance else "-"
        date = item.provenance.date[:10] if item.provenance else "-" * 10
        model = item.entry.weights.parent.name
        size = _megabytes(item.size)
        click.echo(f"{model:<26} {item.state:<10} {size:>11} {date}  {source}")
    total = _megabytes(sum(item.size for item in items))
    click.echo(f"{len(items)} in {settings.home()}, {total}")


@cache_group.command("verify")
def cache_verify() -> None:
    """Hash every file again; exit 1 if one is not what was written."""
    wrong = []
    for item in cache.listing():
        intact = item.provenance is not None and item.entry.is_intact(item.provenance)
        state = "intact" if intact else "unfinished" if item.state == "unfinished" else "DAMAGED"
        click.echo(f"{state:<10} {item.entry.weights}")
        if state == "DAMAGED":
            wrong.append(str(item.entry.weights))
    if wrong:
        raise click.ClickException(  # exit status 1: the check found something
            f"{len(wrong)} damaged: {', '.join(wrong)}; they are made anew when they are next "
            "loaded, and `vitadapter-zoo cache prune` removes what is not complete"
        )


@cache_group.command("prune")
@click.option("--older-than", metavar="AGE", help="Complete weights too: 12h, 30d or 8w.")
@click.option("--all", "everything", is_flag=True, help="All weights, however new.")
def cache_prune(older_than: str | None, everything: bool) -> None:
    """Remove unfinished and damaged files, and by request complete ones."""
    seconds = None
    if older_than:
        found = re.fullmatch(r"(\d+)([hdw])", older_than)
        if not found:
            raise click.UsageError(f"{older_than!r} is no age: write 12h, 30d or 8w")
        seconds = float(int(found[1]) * UNITS[found[2]])
    removed = cache.prune(seconds, everything=everything)
    for item in removed:
        click.echo(f"removed {item.state} {item.entry.weights} ({_megabytes(item.size)})")
    click.echo(f"{len(removed)} removed, {_megabytes(sum(item.size for item in removed))}")


@click.command(
    epilog="\b\nExamples:\n"
    "  vitadapter-zoo convert weights.pth.tar --model adapter-t-deit-3x\n"
    "  vitadapter-zoo convert mine.safetensors --model vit-t-deit-3x --format mmdet\n"
)
@click.argument("source", metavar="SRC")
@click.option("--model", "name", required=True, metavar="NAME", help="Load name, see `list`.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]))
@click.option(
    "--format", "kind", type=click.Choice(["safetensors", "mmdet"]), default="safetensors",
    show_default=True,
)  # fmt: skip
@click.option("--offline", is_flag=True, help="Never use the network.")
@click.option("--force", is_flag=True, help="Replace OUT if it is there.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def convert(
    source: str,
    name: str,
    out: Path | None,
    dtype: str | None,
    kind: str,
    offline: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Turn SRC (a file, an address, hf://user/repo/file) into another container."""
    row = get_row(name)
    target = (out or Path(f"{row.name}{'.pth' if kind == 'mmdet' else '.safetensors'}")).absolute()
    if target.exists() and not force:
        raise ZooError(f"{target} is there already: give --force to replace it, or another --out")
    import torch

    from vitadapter_zoo.weights import convert as conversion
    from vitadapter_zoo.weights import resolve
    from vitadapter_zoo.weights.progress import bars
    from vitadapter_zoo.weights.source import LocalFile, parse

    where = parse(source)
    if isinstance(where, LocalFile):
        paths = resolve.as_they_are(where.path) or [where.path]
    else:
        with bars(not quiet) as lines:
            paths = resolve.obtain(row, where, lines, offline=offline or None)
    wanted = getattr(torch, dtype) if dtype else None
    with cache.locked(settings.home(), f"out-{cache.digest(str(target))}"):
        if kind == "mmdet":
            done = conversion.to_mmdet(paths, str(where), row, target, dtype=wanted)
        else:
            digest = resolve.source_sha256(paths)
            done = conversion.to_safetensors(
                paths, str(where), row, target, sha256=digest, dtype=wanted
            )
    cast = ", ".join(f"{count} from {kind}" for kind, count in done.cast.items()) or "none"
    click.echo(f"{target}: {_megabytes(target.stat().st_size)}, from a {done.container}")
    click.echo(f"cast: {cast}; filled: {len(done.filled)}")


@click.command(epilog="\b\nExample:\n  vitadapter-zoo card --all --out model_cards\n")
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="Every model of the catalog.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder to write to.")
def card(name: str | None, everything: bool, out: Path | None) -> None:
    """Print the model card of NAME, or write cards to a folder."""
    names = _names((name,) if name else (), everything)
    from vitadapter_zoo.publishing import cards

    for row in (row for row in ROWS if row.name in names):
        if out or everything:
            click.echo(cards.write(row, out or Path("model_cards")))
        else:
            click.echo(str(cards.card(row)))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
