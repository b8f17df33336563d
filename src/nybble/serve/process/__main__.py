"""The program of the generator's process: `python -m nybble.serve.process DESCRIPTOR`, started by the server."""

import sys

from nybble.serve.process.child import run

run(int(sys.argv[1]))
