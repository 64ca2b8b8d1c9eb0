"""`edge-stream rpc-server`: let another machine's edge-stream, or llama.cpp of this version, use the devices."""

from __future__ import annotations

import click

from edge_stream.cli import options
from edge_stream.cli.llama_flags import Command


@click.command("rpc-server", cls=Command)
@click.option("-H", "--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("-p", "--port", type=click.IntRange(1, 65535), default=50052, show_default=True, help="Port.")
@click.option(
    "-t", "--threads", "n_threads", type=click.IntRange(1), default=None, help="CPU threads. Default: all cores."
)
@click.option("-d", "--device", "names", type=options.Names(), help="Devices to offer. Default: GPUs, else the CPU.")
def main(host: str, port: int, n_threads: int | None, names: list[str] | None) -> None:
    """Compute layers for `edge-stream ... --rpc HOST:PORT`, one client at a time, until interrupted."""
    from edge_stream.backends.loading import default_threads
    from edge_stream.hardware import devices

    if host not in ("127.0.0.1", "localhost", "::1"):
        click.echo(
            f"warning: anyone who can reach {host}:{port} can use this process; the protocol has no authentication. "
            "Use it only in a network that you trust.",
            err=True,
        )
    devices.serve_rpc(host, port, n_threads or default_threads(), names)
