"""`python -m benchmarks` runs the suite."""

import sys

try:
    from benchmarks.arguments import parser

    parser().parse_args()  # --help and wrong arguments end here, before a run's packages are needed
    from benchmarks.run import main
except ModuleNotFoundError as error:
    sys.exit(
        f'python -m benchmarks needs {error.name}, which the extra "bench" brings: in the checkout '
        f'run {sys.executable} -m pip install -e ".[bench]"'
    )

if __name__ == "__main__":
    sys.exit(main())
