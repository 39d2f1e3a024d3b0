"""An engine a file, which defines `Engine`. Nothing else names it, and none imports its library or torch when read."""
