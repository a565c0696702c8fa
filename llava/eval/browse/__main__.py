"""`python -m llava.eval.browse`, see `program.py`."""

from llava.eval.browse.program import main

if __name__ == "__main__":
    main()
