"""LLaVA's name of `llava.eval.benchmarks.pope`."""

from llava.eval.benchmarks.pope import main

if __name__ == "__main__":
    main()
