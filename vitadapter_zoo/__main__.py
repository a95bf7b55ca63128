"""``python -m vitadapter_zoo``: the command, for when its script is not on the PATH."""

from vitadapter_zoo.cli import main

main(prog_name="vitadapter-zoo")
