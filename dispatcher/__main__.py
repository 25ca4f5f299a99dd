"""`python -m dispatcher` is the program `dispatcher`."""

import sys

from dispatcher.cli import main

if __name__ == "__main__":
    sys.exit(main())
