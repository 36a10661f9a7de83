"""Images: where they come from, which at which step, and what happens to them."""
