"""Download, cache, read, check and convert weights."""
