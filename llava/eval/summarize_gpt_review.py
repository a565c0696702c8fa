"""LLaVA's name of `llava.eval.benchmarks.review_summary`."""

from llava.eval.benchmarks.review_summary import main

if __name__ == "__main__":
    main()
