"""`python -m tetriserve` is the `tetriserve` command."""

from tetriserve.cli import main

if __name__ == "__main__":
    main()
