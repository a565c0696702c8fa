"""`python -m llava.eval.efficiency`, see `program.py`."""

from llava.eval.efficiency.program import main

if __name__ == "__main__":
    main()
