"""`python -m effbench.cli`."""

from effbench.cli.app import main

if __name__ == "__main__":
    main()
