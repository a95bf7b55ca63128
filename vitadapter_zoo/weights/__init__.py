"""From a name to tensors that fit: sources, downloads, the cache, reading and conversion."""
