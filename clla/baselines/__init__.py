"""Published methods, one file each, and our own on the same caches."""
