"""What leaves the machine: model card, contents, base model, and the upload to the Hub."""
