"""LLaVA's name of `llava.eval.benchmarks.sqa`."""

from llava.eval.benchmarks.sqa import main

if __name__ == "__main__":
    main()
