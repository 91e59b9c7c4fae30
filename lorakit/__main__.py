"""`python -m lorakit` runs the same program as `lorakit`."""

from lorakit.cli import main

if __name__ == "__main__":
    main()
