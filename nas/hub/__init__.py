"""A network's folder as a repository of the Hugging Face hub: what is in it, its page, and the upload."""
