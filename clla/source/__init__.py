"""The Hugging Face model that is converted: opened, placed, and what its family allows."""
