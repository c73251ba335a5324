"""`python -m onlay.cli`."""

from onlay.cli import main

if __name__ == "__main__":
    main()
