"""`edge-stream rpc-server`: let another machine's edge-stream, or llama.cpp of this version, use the devices."""

from __future__ import annotations

import click

from edge_stream.cli import options
from edge_stream.cli.llama_flags import Command

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@click.command("rpc-server", cls=Command)
@click.option("-H", "--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("-p", "--port", type=click.IntRange(1, 65535), default=50052, show_default=True, help="Port.")
@click.option(
    "-t", "--threads", "n_threads", type=click.IntRange(1), default=None, help="CPU threads. Default: all cores."
)
@click.option("-d", "--device", "names", type=options.Names(), help="Devices to offer. Default: GPUs, else the CPU.")
@click.option("--trust-network", is_flag=True, help="Listen on an address that other machines can reach.")
def main(host: str, port: int, n_threads: int | None, names: list[str] | None, trust_network: bool) -> None:
    """Compute layers for `edge-stream ... --rpc HOST:PORT`, one client at a time, until interrupted."""
    from edge_stream.backends.loading import default_threads
    from edge_stream.hardware import devices

    if host not in LOOPBACK:
        if not trust_network:
            raise click.UsageError(
                f"--host {host} can be reached from other machines, and the protocol has no authentication: whoever "
                "reaches the port can use this process (--trust-network, if all who can are trusted)."
            )
        click.echo(f"warning: whoever can reach {host}:{port} can use this process.", err=True)
    devices.serve_rpc(host, port, n_threads or default_threads(), names)
