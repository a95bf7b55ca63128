"""``python -m vitadapter_zoo``: the command where its script is not on the path."""

from vitadapter_zoo.cli import main

main(prog_name="vitadapter-zoo")
