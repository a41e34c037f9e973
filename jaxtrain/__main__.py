"""`python -m jaxtrain COMMAND ...`: the same as the console command `jaxtrain`."""

from jaxtrain.host import search_path

if __name__ == "__main__":
    search_path.leave_out_the_current_directory()  # before anything else is imported
    from jaxtrain.cli import program

    program()
