"""Images in, batches out: sources, shards with an index, the order of an epoch, transforms, the loader."""
