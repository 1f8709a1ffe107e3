"""Published methods and our own side by side on one model: the same text, real caches, measured bytes."""
