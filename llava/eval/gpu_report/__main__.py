"""`python -m llava.eval.gpu_report`, see `program.py`."""

from llava.eval.gpu_report.program import main

if __name__ == "__main__":
    main()
