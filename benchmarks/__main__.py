"""`python -m benchmarks` runs the suite."""

import sys

from benchmarks import what_brings

try:
    from benchmarks.arguments import parser

    parser().parse_args()  # --help and wrong arguments end here, before a run's packages are needed
    import snntorch  # noqa: F401

    from benchmarks.run import main
except ImportError as error:
    text = f"python -m benchmarks: {error}"  # the core is missing, or does not load
    if isinstance(error, ModuleNotFoundError):
        text = f'python -m benchmarks needs {error.name}, which the extra "bench" brings'
    sys.exit(what_brings(text))

if __name__ == "__main__":
    sys.exit(main())
