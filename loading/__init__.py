"""From files to batches: decoding images, transforms, order and randomness, loaders, streams."""
