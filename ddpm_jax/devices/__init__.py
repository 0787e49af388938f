"""Start devices and processes, distribute work over them, and estimate the cost of a step."""
