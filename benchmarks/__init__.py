"""What is measured, against whom: run as `python -m benchmarks.<name>`."""
