"""`python -m benchmarks.demo` runs the demo."""

from benchmarks.demo.comparison import main

if __name__ == "__main__":
    main()
