"""What benchmark.py is made of: processes that each hold one network in one engine, their timing, and the report."""
