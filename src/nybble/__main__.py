"""python -m nybble."""

import os
import sys

# Python puts the current folder first where it is asked for a module, so a torch.py that lies there would be taken for torch.
if not sys.flags.safe_path and sys.path[0] in {"", os.getcwd()} - {__file__.rpartition("/nybble/")[0]}:
    del sys.path[0]

from nybble.cli import main

main()
