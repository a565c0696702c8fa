"""LLaVA's name of `llava.eval.benchmarks.textvqa`."""

from llava.eval.benchmarks.textvqa import main

if __name__ == "__main__":
    main()
