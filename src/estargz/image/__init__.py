"""Images: references, stores, what an image consists of, and how one becomes another."""
