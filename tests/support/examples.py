"""How many examples the slow generators try: ``EXAMPLES=500 pytest -m slow ...`` for fewer."""

import os

MANY = int(os.environ.get("EXAMPLES", "10000"))
SECONDS = 10  # of processor time for one example: the wall clock also counts the neighbours
