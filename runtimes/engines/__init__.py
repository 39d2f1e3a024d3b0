"""Each file defines one `Engine` and is found by listing this folder. It imports torch and its library only in use."""
