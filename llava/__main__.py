"""`python -m llava`, see `command.py`."""

from llava.command import main

if __name__ == "__main__":
    main()
