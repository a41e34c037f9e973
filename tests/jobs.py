"""Runs command lines one after the other in one process, so that JAX and the other processes are started once.

python jobs.py '[["train", "--config", ...], ["train", ...]]'
"""

import json
import sys

from jaxtrain.cli import main

if __name__ == "__main__":
    for argv in json.loads(sys.argv[1]):
        if code := main(argv):
            sys.exit(code)
