"""`python -m llava.pruning`, see `program.py`."""

from llava.pruning.program import main

if __name__ == "__main__":
    main()
