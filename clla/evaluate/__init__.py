"""What a converted model loses and saves: perplexity, retrieval, bytes, errors by layer."""
