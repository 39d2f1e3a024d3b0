"""The parts of benchmark.py: processes that each hold one network in one engine, their timing, and the report."""
