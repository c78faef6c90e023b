"""`python -m benchmarks` runs the suite."""

import sys

try:
    from benchmarks.run import main
except ModuleNotFoundError as error:
    sys.exit(
        f"python -m benchmarks needs {error.name}: in the checkout run "
        f'{sys.executable} -m pip install -e ".[bench]"'
    )

if __name__ == "__main__":
    sys.exit(main())
