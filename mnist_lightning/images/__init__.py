"""Images: where they come from, how they are deformed and prepared."""
