"""`python -m litune` is `litune`."""

from litune.cli import main

if __name__ == "__main__":
    main()
