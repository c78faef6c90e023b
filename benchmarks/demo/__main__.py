"""`python -m benchmarks.demo` runs the demo."""

import sys

from benchmarks.demo.comparison import main

if __name__ == "__main__":
    sys.exit(main())
