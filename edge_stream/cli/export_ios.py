"""`edge-stream export-ios`: a folder with a model and its manifest, for the app in ios_demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edge_stream.cache_types import CACHE_TYPES
from edge_stream.cli import options
from edge_stream.cli.convert import Size
from edge_stream.cli.llama_flags import Command
from edge_stream.errors import EdgeStreamError
from edge_stream.ios.phones import PHONES


@click.command("export-ios", cls=Command)
@options.model_option()
@click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path), required=True, metavar="FOLDER", help="Must not exist."
)
@click.option(
    "--device",
    type=click.Choice(list(PHONES)),
    default="iphone-15",
    show_default=True,
    help="The smallest phone to support.",
)
@click.option(
    "--memory",
    "limit",
    type=Size(),
    metavar="N(M|G)",
    help="Memory that an app may use there, instead of the table's figure.",
)
@click.option(
    "-c",
    "--ctx-size",
    "n_ctx",
    type=click.IntRange(min=2),
    metavar="N",
    help="Cache capacity. Default: the model's, or its training length up to 8192, halved until it fits.",
)
@click.option("--keep", "n_keep", type=click.IntRange(min=0), metavar="N", help="Sinks. Default: the model's, or 4.")
@click.option(
    "-ctk", "--cache-type-k", type=click.Choice(list(CACHE_TYPES)), help="Default: f16 if that fits, else q8_0."
)
@click.option(
    "-ctv", "--cache-type-v", type=click.Choice(list(CACHE_TYPES)), help="Default: f16 if that fits, else q8_0."
)
@click.option(
    "--chat-template",
    metavar="TEMPLATE",
    help="Jinja, or the name of one of llama.cpp's (chatml, llama3, ...), instead of the model's.",
)
@click.option("--name", help="Name to show in the app. Default: that of the file.")
@click.option(
    "--list-devices",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda ctx, _param, value: _list_devices(ctx, value),
    help="List the phones with the source of each figure, and exit.",
)
def main(model: str, out: Path, device: str, limit: int | None, name: str | None, **flags: Any) -> None:
    """Package a model for an iOS app: choose a cache that fits the phone's memory, and write FOLDER.

    Of a GGUF file, for the app in ios_demo: copy FOLDER to the phone (Files, AirDrop, Finder) and import it in the app,
    which verifies its checksum. Memory is computed for this machine's backend; the app computes it again before it
    loads the model.

    Of an MLC folder, for MLC's app: FOLDER is what `mlc_llm package` takes, with the library compiled for iPhones.
    Sinks and window are those of the folder.

    \b
    edge-stream export-ios -m model.gguf -o for-my-phone --device iphone-15-pro
    edge-stream export-ios -m model-MLC -o for-mlc
    """
    from edge_stream.cli.meter import Meter
    from edge_stream.ios import export
    from edge_stream.models import names

    path = names.resolve(model)
    phone = PHONES[device]
    allowed = limit or phone.limit.n_bytes
    if path.is_dir():
        given = [key for key, value in flags.items() if value is not None]
        if given:
            flag = {"n_ctx": "-c", "n_keep": "--keep"}.get(given[0], "--" + given[0].replace("_", "-"))
            raise EdgeStreamError(f"{flag} is not for an MLC folder, which has its settings from convert")
        return _package(path, out, name, allowed)
    if names.is_split(path):
        raise EdgeStreamError(f"{path.name} is one part of several: merge them first (llama-gguf-split --merge)")
    choice = export.choose(path, export.ExportRequest(**flags), allowed)
    if choice.note:
        click.echo(f"note: {choice.note}; --chat-template gives another", err=True)
    with Meter(in_bytes=True) as meter:
        manifest = export.export(
            path,
            out,
            choice,
            name=name or path.stem,
            device=phone.title if limit is None else f"{limit / 1e9:g} GB for an app",
            chat_template=flags["chat_template"],
            on_progress=lambda done, total: meter.show(f"copying {path.name}", done, total),
        )
    click.echo(
        f"wrote {out}: n_ctx {choice.n_ctx}, n_keep {choice.n_keep}, "
        f"cache {choice.cache_type_k}/{choice.cache_type_v}\n"
        f"at most {choice.peak / 2**20:,.0f} MiB (weights {choice.memory['weights'] / 2**20:,.0f}, cache "
        f"{choice.memory['cache'] / 2**20:,.0f}, the same again while it is saved, scratch "
        f"{choice.memory['compute'] / 2**20:,.0f}, {export.RESERVE / 2**20:,.0f} for the app) of "
        f"{allowed / 2**20:,.0f} MiB on {manifest['device']}"
    )


def _package(path: Path, out: Path, name: str | None, allowed: int) -> None:
    from edge_stream.ios import mlc_package
    from edge_stream.mlc.folder import MlcFolder

    config, plan = mlc_package.package(
        MlcFolder(path), out, name or path.resolve().name, allowed, lambda line: click.echo(line, err=True)
    )
    (model,) = config["model_list"]
    parts = ", ".join(f"{part} {size / 2**20:,.0f}" for part, size in plan.items())
    click.echo(
        f"wrote {out}: {model['model_id']}, library {model['model_lib']}\n"
        f"about {sum(plan.values()) / 2**20:,.0f} MiB ({parts}) of {allowed / 2**20:,.0f} MiB"
    )


def _list_devices(ctx: click.Context, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    for phone in PHONES.values():
        click.echo(f"{phone.name:14} {phone.title}: {phone.ram} GB, an app may use {phone.limit.n_bytes / 1e9:g} GB")
        click.echo(f"{'':14} RAM: {phone.source}")
        click.echo(f"{'':14} limit: {phone.limit.source}")
    ctx.exit()
