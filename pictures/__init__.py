"""What `visualize.py` draws; each module returns a matplotlib figure and knows nothing of the command line."""
