"""`python -m jaxtrain.main --config FILE[:ARGUMENTS] [--config.KEY=VALUE ...]`: trains. The same as `jaxtrain train`."""

import sys

from jaxtrain.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
