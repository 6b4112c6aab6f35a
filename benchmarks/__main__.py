"""`python -m benchmarks NAME [options]`."""

from .harness import main

main()
