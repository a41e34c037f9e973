"""`python -m jaxtrain.main --config FILE[:ARGUMENTS] [--config.KEY=VALUE ...]`: trains. The same as `jaxtrain train`."""

import sys

from jaxtrain.host import search_path

if __name__ == "__main__":
    search_path.leave_out_the_current_directory()  # before anything else is imported
    from jaxtrain.cli import program

    program(["train", *sys.argv[1:]])
