"""An engine a file."""
