"""`edge-stream eval`: how well a model works along a stream. One module per subcommand."""

from __future__ import annotations

import click

from edge_stream.cli.dispatch import Dispatcher

COMMANDS = {
    "ppl": "Perplexity along a text: overall, after the cache filled, and per segment.",
    "sinks": "Perplexity with 0, 1, 2, 4 and 8 sinks, and which number to use.",
    "streameval": "Accuracy of answers against the distance of the fact (StreamEval).",
    "recall": "Accuracy of answers about what left the window, with recall and without.",
    "qa-stream": "Exact match of questions joined into one long stream.",
    "soak": "Stream for hours; fail if memory, latency or NLL trend upwards.",
}


@click.group("eval", cls=Dispatcher, package=__name__, commands=COMMANDS)
def main() -> None:
    """Measure perplexity and recall along a stream, by mode, or watch a stream for hours."""
