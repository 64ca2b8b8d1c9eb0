"""python -m edge_stream.cli."""

from edge_stream.cli import main

main()
