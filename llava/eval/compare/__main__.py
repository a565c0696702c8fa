"""`python -m llava.eval.compare`, see `program.py`."""

from llava.eval.compare.program import main

if __name__ == "__main__":
    main()
