"""Load any Hugging Face image-text-to-text model and ask it about images."""
